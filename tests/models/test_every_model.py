"""What holds for every model that can be made by name: lengths, sizes, weights, refusals, tracing, streams, causality.

By default one small model of each family, three of torchvision's, and the specs of all names (timm's too).

``-m slow``: every one of Sidestream's own and of torchvision's, and one of each module of timm, at two sizes or, where
it takes one only, with the refusal of others; compiled and exported one of each module of torchvision and timm; and all
of timm laid out without memory for weights. Left out: foreign models of more than 150 million parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import model_zoo
import pytest
import torch
from model_zoo import (
    FIXED_SIZE,
    FOREIGN,
    HUGE,
    TIMM_FEW,
    TORCHVISION,
    clip_of,
    lengths,
    lively,
    on_meta,
    rule_of,
    sizes_px,
    spec_of,
    timm_names,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sidestream.errors import LayoutError, WeightsError
from sidestream.models import create_model, list_models, load_weights, model_info, save_weights
from sidestream.models.clip_border import ClipBorder
from sidestream.models.guard import SizeRule
from sidestream.nn.steppable import step_through
from sidestream.types import InputSpec

OWN = [name for name in model_zoo.OWN if model_info(name).task not in ("keypoints", "pictures")]
"""Those that answer classes; the others are in test_autoencoder."""
FEW = ["frame_efficientnet_lite0", "cnn_gru", "c3d", "r3d_18", "i3d", "slowfast_r50", "tsm_mobilenet_v2_online"]
FEW_TRACED = ["frame_efficientnet_lite0", "r3d_18", "tsm_mobilenet_v2_online"]
NO_RNN = "Dynamo does not support RNN, GRU, or LSTM"
NO_COMPILE = {"cnn_lstm": NO_RNN, "cnn_gru": NO_RNN, "timm/sequencer2d_*": NO_RNN}
"""Names -> what the error says. The tests check that it still does, so that nothing stays listed that works by now."""
NO_EXPORT: dict[str, str] = {}
"""The same for torch.export."""
NUM_CLASSES = 7


def every(names: list[str], few: list[str]) -> list[object]:
    """A parameter per name; those that are not among the few are slow."""
    return [pytest.param(name, marks=[] if name in few else [pytest.mark.slow]) for name in names]


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
        made[name] = lively(create_model(name, num_classes=NUM_CLASSES), list(inputs(name))[-1])
    return made[name]


@pytest.mark.parametrize("name", every(OWN, FEW), scope="module")
class TestOwn:
    @torch.no_grad()
    def test_two_lengths_and_sizes(self, name: str, made: dict[str, nn.Module]) -> None:
        model = model_of(name, made)
        for given in inputs(name):
            answers = model(given)
            assert answers.shape == (1, NUM_CLASSES) or model_info(name).task not in ("image", "clip")
            assert len(answers) == 1
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
    check_traces(name, model_of(name, made), list(inputs(name))[-1])


@torch.no_grad()
def check_traces(name: str, model: nn.Module, given: Tensor) -> None:
    """``torch.compile`` without a break and ``torch.export`` keep the answers; what is listed as failing still does."""
    expected = values(model(given))

    def compiled() -> object:
        torch.compiler.reset()
        return torch.compile(model, backend="eager", fullgraph=True)(given)

    def exported() -> object:
        return torch.export.export(model, (given,)).module()(given)

    for traced, failing in ((compiled, NO_COMPILE), (exported, NO_EXPORT)):
        if reason := next((why for pattern, why in failing.items() if fnmatchcase(name, pattern)), None):
            with pytest.raises(Exception, match=reason):
                traced()
            continue
        for found, wanted in zip(values(traced()), expected, strict=True):
            assert torch.allclose(found, wanted, atol=1e-4)


def values(answers: object) -> list[Tensor]:
    return list(answers.values()) if isinstance(answers, dict) else [answers]  # type: ignore[list-item]


FEW_OF_TORCHVISION = [
    "torchvision/mobilenet_v3_small",
    "torchvision/mnasnet0_5",
    "torchvision/lraspp_mobilenet_v3_large",
]
MOST_FRAMES = 32


@pytest.mark.parametrize("name", every([*TORCHVISION, *TIMM_FEW], FEW_OF_TORCHVISION))
@torch.no_grad()
def test_of_another_library(name: str, tmp_path: Path) -> None:
    """Its own size and another one, in a batch and in other lengths; strict weights; refusals."""
    model, spec, rule = foreign(name)
    own = clip_of(spec, min(spec.num_frames, MOST_FRAMES), spec.size_px, 1)
    answers = model(own)
    for given in (own, *others(model, spec, rule)):
        for value in values(model(given)):
            assert value.shape[0] == len(given)
            assert value.isfinite().all()
    again = create_model(name, weights=save_weights(model, tmp_path / "w.safetensors"))
    for old, new in zip(values(answers), values(again(own)), strict=True):
        assert torch.equal(old, new)
    for wrong in (own.movedim(-3, -1), own[0], (own * 255).to(torch.uint8)):
        with pytest.raises(LayoutError, match="expected"):
            model(wrong)
    for wrong in refused(model, spec, rule):
        with pytest.raises(LayoutError, match=r"was given .*; it (takes|needs) "):
            model(wrong)


@pytest.mark.parametrize("name", every(FOREIGN, ["torchvision/alexnet"]))
def test_of_another_library_compiles_and_exports(name: str) -> None:
    model, spec, rule = foreign(name)
    check_traces(name, model, others(model, spec, rule)[0][:1])


def foreign(name: str) -> tuple[nn.Module, InputSpec, SizeRule]:
    """A model of another library, unless it is huge, and the sizes that it takes."""
    if sum(p.numel() for p in on_meta(name).parameters()) > HUGE:
        pytest.skip(f"more than {HUGE / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = create_model(name)
    return model, spec_of(name), rule_of(model)


def others(model: nn.Module, spec: InputSpec, rule: SizeRule) -> list[Tensor]:
    """Two items of another size and length, as far as it takes any."""
    size, num_frames = (96, 128), 9
    if rule.only_px is not None:
        size = rule.only_px
    elif rule.multiple_of_px is not None:
        size = (-(-96 // rule.multiple_of_px[0]) * rule.multiple_of_px[0], 2 * rule.multiple_of_px[1])
        size = (size[0], -(-128 // rule.multiple_of_px[1]) * rule.multiple_of_px[1]) if size[1] < 128 else size
    elif rule.least_px is not None:
        size = (rule.least_px, rule.least_px + 15)
    if isinstance(model, ClipBorder):
        num_frames = model.only_frames or max(num_frames, model.min_frames)
    return [clip_of(spec, num_frames, size, 2)]


def refused(model: nn.Module, spec: InputSpec, rule: SizeRule) -> list[Tensor]:
    height, width = spec.size_px
    sizes = []
    if rule.only_px is not None:
        sizes = [(height + 32, width), (height, width // 2)]
    elif rule.multiple_of_px is not None:
        sizes = [(height + 1, width), (height, width + 1)]
    elif rule.least_px is not None:
        sizes = [(rule.least_px - 1, width)]
    wrong = [clip_of(spec, min(spec.num_frames, MOST_FRAMES), size, 1) for size in sizes]
    if isinstance(model, ClipBorder):
        lengths = [] if model.only_frames is None else [model.only_frames - 1, model.only_frames + 1]
        lengths += [model.min_frames - 1] if model.min_frames > 1 else []
        wrong += [clip_of(spec, length, spec.size_px, 1) for length in lengths]
    return wrong


def test_every_name_has_a_spec_that_makes_sense() -> None:
    for name in list_models():
        info, spec = model_info(name), spec_of(name)
        assert info.name == name
        assert min(spec.size_px) >= 16
        assert spec.resize_px is None or spec.resize_px >= min(spec.size_px)
        assert len(spec.mean) == len(spec.std) == 3
        assert min(spec.std) > 0
        assert (spec.layout == "BTCHW") == (info.task not in ("image", "segmentation")), name
        assert spec.num_frames >= (spec.min_frames or 1) >= 1
        assert spec.causal or spec.layout == "BTCHW"
        assert info.labels is None or len(info.labels) == info.num_classes


PORTIONS = 16


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("portion", range(PORTIONS))
def test_all_of_timm_can_be_laid_out(portion: int) -> None:
    """Every name of timm is made, without memory for its weights, and has a rule for its sizes that lets its own in."""
    names = timm_names()[portion::PORTIONS]
    for name in names:
        with torch.device("meta"):
            model = create_model(name)
        rule_of(model).check(name, *spec_of(name).size_px)
        assert sum(p.numel() for p in model.parameters()) > 0
