"""What holds for every model that can be made by name: lengths, sizes, weights, refusals, tracing, streams, causality.

By default one small model of each family goes through all of it; ``-m slow`` takes every one of Sidestream's own and of
torchvision's, and one of each family of timm.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sidestream.errors import LayoutError, WeightsError
from sidestream.models import create_model, list_models, load_weights, model_info, save_weights
from sidestream.nn.steppable import step_through
from sidestream.types import InputSpec

OWN = [name for name in list_models() if "/" not in name]
FEW = ["frame_efficientnet_lite0", "cnn_gru", "c3d", "r3d_18", "i3d", "slowfast_r50", "tsm_mobilenet_v2_online"]
FEW_TRACED = ["frame_efficientnet_lite0", "r3d_18", "tsm_mobilenet_v2_online"]
FIXED_SIZE = {"videomae": 224, "vivit": 224, "frame_vit": 224}
"""Beginning of a name -> the one size it takes; it refuses others."""
NO_COMPILE = {"cnn_lstm": "dynamo does not trace nn.LSTM", "cnn_gru": "dynamo does not trace nn.GRU"}
NO_EXPORT: dict[str, str] = {}
NUM_CLASSES = 7


def every(names: list[str], few: list[str]) -> list[object]:
    """A parameter per name; those that are not among the few are slow."""
    return [pytest.param(name, marks=[] if name in few else [pytest.mark.slow]) for name in names]


@cache
def spec_of(name: str) -> InputSpec:
    return model_info(name).input_spec


def sizes_px(name: str) -> list[tuple[int, int]]:
    fixed = [size for start, size in FIXED_SIZE.items() if name.startswith(start)]
    return [(fixed[0], fixed[0])] if fixed else [(64, 64), (96, 128)]


def lengths(name: str) -> list[int]:
    spec = spec_of(name)
    if spec.min_frames is None:
        return [spec.num_frames]
    return [spec.min_frames, max(spec.min_frames + 3, 9)]


def inputs(name: str) -> Iterator[Tensor]:
    """Two lengths and two sizes where it takes any."""
    chance = torch.Generator().manual_seed(1)
    for num_frames, size in zip(*_as_long(lengths(name), sizes_px(name)), strict=True):
        clip = torch.randn(1, num_frames, 3, *size, generator=chance)
        yield clip[:, 0] if spec_of(name).layout == "BCHW" else clip


def _as_long(a: list[int], b: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
    return (a * 2)[: max(len(a), len(b))], (b * 2)[: max(len(a), len(b))]


@pytest.fixture(scope="module")
def made() -> Iterator[dict[str, nn.Module]]:
    """The newest model, so that a name's tests share it."""
    kept: dict[str, nn.Module] = {}
    yield kept
    kept.clear()


def model_of(name: str, made: dict[str, nn.Module]) -> nn.Module:
    if name not in made:
        made.clear()
        torch.manual_seed(0)
        made[name] = _lively(create_model(name, num_classes=NUM_CLASSES), list(inputs(name))[-1])
    return made[name]


@torch.no_grad()
def _lively(model: nn.Module, given: Tensor) -> nn.Module:
    """Fresh weights that start at zero would hide what they multiply, fresh batch norms let signals fade or grow."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None  # the statistics of what it has seen
        norm.train()
    if norms:
        model(torch.cat([given, given.flip(-1) * 0.7]))
    return model.eval()


@pytest.mark.parametrize("name", every(OWN, FEW), scope="module")
class TestOwn:
    @torch.no_grad()
    def test_two_lengths_and_sizes(self, name: str, made: dict[str, nn.Module]) -> None:
        model = model_of(name, made)
        for given in inputs(name):
            answers = model(given)
            assert answers.shape == (1, NUM_CLASSES)
            assert answers.isfinite().all()
            assert not answers.allclose(model(given * 0.5 + 0.1)), "it answers the same whatever it sees"

    @torch.no_grad()
    def test_weights_are_saved_and_loaded_strictly(self, name: str, made: dict[str, nn.Module], tmp_path: Path) -> None:
        model, given = model_of(name, made), next(inputs(name))
        file = save_weights(model, tmp_path / "w.safetensors")
        other = create_model(name, num_classes=NUM_CLASSES, weights=file)
        assert torch.equal(other(given), model(given))
        state = load_file(file)
        state.pop(next(key for key, value in state.items() if value.ndim > 0))
        save_file(state, tmp_path / "less.safetensors")
        with pytest.raises(WeightsError, match="1 missing"):
            load_weights(other, tmp_path / "less.safetensors")

    def test_refuses_what_it_was_not_made_for(self, name: str, made: dict[str, nn.Module]) -> None:
        model, given, spec = model_of(name, made), next(inputs(name)), spec_of(name)
        wrong = [given.movedim(-3, -1), given[0], (given * 255).to(torch.uint8)]
        if spec.layout == "BTCHW":
            wrong.append(given.transpose(1, 2))
            least = spec.min_frames or spec.num_frames
            wrong += [given[:, :1].expand(-1, n, -1, -1, -1) for n in ({least - 1} if least > 1 else set())]
            wrong += [torch.cat([given, given[:, :1]], 1)] if spec.min_frames is None else []
        for size in FIXED_SIZE:
            wrong += [given[..., :-16, :-16]] if name.startswith(size) else []
        for x in wrong:
            with pytest.raises(LayoutError, match=r"expected|needs|reads|takes"):
                model(x)

    @torch.no_grad()
    def test_streams_as_it_claims(self, name: str, made: dict[str, nn.Module]) -> None:
        model = model_of(name, made)
        if not hasattr(model, "streaming"):
            assert spec_of(name).delay_ticks == 0
            pytest.skip("claims no streaming form")
        stream = model.streaming()
        assert stream.delay_ticks == spec_of(name).delay_ticks
        given = next(inputs(name))
        num_frames = -(-max(given.shape[1], 9) // stream.period_ticks) * stream.period_ticks
        clip = torch.randn(1, num_frames, 3, *given.shape[-2:], generator=torch.Generator().manual_seed(2))
        answers, _ = step_through(stream, clip, and_finish=True)
        expected = model.answers(clip)
        assert answers.shape == expected.shape
        assert torch.allclose(answers, expected, atol=2e-4 * float(expected.abs().max()) + 1e-5)

    @torch.no_grad()
    def test_is_causal_if_it_claims_so(self, name: str, made: dict[str, nn.Module]) -> None:
        model, spec = model_of(name, made), spec_of(name)
        if spec.layout == "BCHW":
            assert spec.causal
            return
        if not hasattr(model, "answers"):
            assert not spec.causal
            pytest.skip("answers only the whole clip, and claims no more")
        clip = list(inputs(name))[-1]
        period = model.streaming().period_ticks if hasattr(model, "streaming") else 1
        num_frames = max(clip.shape[1], 16, 2 * period)
        clip = torch.randn(1, num_frames, 3, *clip.shape[-2:], generator=torch.Generator().manual_seed(3))
        whole, poisoned = model.answers(clip), clip.clone()
        half = num_frames // 2 - 1  # odd, so that a pair of frames is parted
        poisoned[:, half:] = float("nan")
        seen = model.answers(poisoned)
        num_before = -(-half // period)  # answer n is that of frame n * period
        is_clean = bool(seen[:, :num_before].isfinite().all())
        assert is_clean == spec.causal
        if spec.causal:
            assert torch.allclose(seen[:, :num_before], whole[:, :num_before], atol=1e-5)
            assert seen[:, num_before:].isnan().any()


@pytest.mark.parametrize("name", every(OWN, FEW_TRACED))
def test_compiles_and_exports(name: str, made: dict[str, nn.Module]) -> None:
    model, given = model_of(name, made), list(inputs(name))[-1]
    with torch.no_grad():
        expected = model(given)
        if name in NO_COMPILE:
            pytest.skip(NO_COMPILE[name])
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(given), expected, atol=1e-4)
        if name in NO_EXPORT:
            pytest.skip(NO_EXPORT[name])
        exported = torch.export.export(model, (given,)).module()
        assert torch.allclose(exported(given), expected, atol=1e-4)


TORCHVISION = list_models("torchvision/*")
FEW_OF_TORCHVISION = [
    "torchvision/mobilenet_v3_small",
    "torchvision/mnasnet0_5",
    "torchvision/lraspp_mobilenet_v3_large",
]
HUGE = 150_000_000
"""Parameters; larger models of the other libraries are not made here."""


@cache
def timm_names() -> list[str]:
    """One name of each module of timm: its smallest by name length."""
    import timm

    found: dict[str, str] = {}
    for name in sorted(timm.list_models(), key=lambda n: ("tiny" not in n and "small" not in n, len(n))):
        module = timm.model_entrypoint(name).__module__
        found.setdefault(module, f"timm/{name}")
    return sorted(found.values())


@pytest.mark.parametrize("name", every(TORCHVISION, FEW_OF_TORCHVISION))
@torch.no_grad()
def test_torchvision(name: str, tmp_path: Path) -> None:
    _check_foreign(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", timm_names())
@torch.no_grad()
def test_timm(name: str, tmp_path: Path) -> None:
    _check_foreign(name, tmp_path)


def _check_foreign(name: str, tmp_path: Path) -> None:
    """A model of another library: its own size, strict weights, refusals."""
    model, spec = create_model(name), spec_of(name)
    if sum(p.numel() for p in model.parameters()) > HUGE:
        pytest.skip("too large for this test")
    shape = (1, 3, *spec.size_px) if spec.layout == "BCHW" else (1, spec.num_frames, 3, *spec.size_px)
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    answers = model(given)
    for value in answers.values() if isinstance(answers, dict) else [answers]:
        assert value.isfinite().all()
    other = create_model(name, weights=save_weights(model, tmp_path / "w.safetensors"))
    again = other(given)
    for old, new in zip(_values(answers), _values(again), strict=True):
        assert torch.equal(old, new)
    for wrong in (given.movedim(-3, -1), given[0], (given * 255).to(torch.uint8)):
        with pytest.raises(LayoutError, match="expected"):
            model(wrong)


def _values(answers: object) -> list[Tensor]:
    return list(answers.values()) if isinstance(answers, dict) else [answers]  # type: ignore[list-item]
