"""Slow, C2D, I3D-R50, SlowFast and X3D against pytorchvideo, with the same weights: values and every gradient."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidestream.models import create_model
from sidestream.models.slowfast import SlowFast
from sidestream.models.slowfast_single import PLANS, SinglePathway
from sidestream.models.weights import load_state
from sidestream.models.x3d import X3D

pytest.importorskip("pytorchvideo")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pytorchvideo.models import hub
    from pytorchvideo.models.slowfast import create_slowfast
    from pytorchvideo.models.x3d import create_x3d

NAMES = ["slow_r50", "c2d_r50", "i3d_r50", "slowfast_r50", "x3d_xs", "x3d_s", "x3d_m", "x3d_l"]
FAMILY = {"slowfast": "slowfast", "x3d": "x3d"}
"""Beginning of a name -> its file; the others are in ``slowfast_single``."""


def mapped(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    file = FAMILY.get(name.partition("_")[0], "slowfast_single")
    return importlib.import_module(f"sidestream.models.{file}").key_map(name)(dict(state))


def randomised(net: Any, seed: int = 3) -> Any:
    """Weights and statistics that show every mistake (fresh, the last batch norm of each block is zero)."""
    chance = torch.Generator().manual_seed(seed)
    for name, value in net.state_dict().items():
        if value.ndim > 1:
            value.copy_(torch.randn(value.shape, generator=chance, dtype=value.dtype) * value[0].numel() ** -0.5)
        elif name.endswith(("weight", "running_var")):
            value.copy_(torch.rand(value.shape, generator=chance, dtype=value.dtype) + 0.5)
        elif value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=chance, dtype=value.dtype) * 0.2)
    return net


def clip_of(num_frames: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (2, num_frames, 3, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def fed(name: str, theirs: nn.Module, clip_BTCHW: Tensor) -> Tensor:
    """Their answer; SlowFast wants the frames of both pathways."""
    clip_BCTHW = clip_BTCHW.transpose(1, 2)
    return theirs([clip_BCTHW[:, :, ::4], clip_BCTHW] if name.startswith("slowfast") else clip_BCTHW)


def small_single(kind: str) -> tuple[nn.Module, nn.Module]:
    frames = 8 if kind == "slow" else 4
    options = {"stem_dim_out": 8, "model_num_class": 5, "dropout_rate": 0.0, "head_pool_kernel_size": (frames, 2, 2)}
    if kind == "slow":  # the hub sets its size itself
        from pytorchvideo.models.resnet import create_resnet

        theirs = create_resnet(stem_conv_kernel_size=(1, 7, 7), **options)
    else:
        theirs = getattr(hub, f"{kind}_r50")(**options)
    return theirs, SinglePathway(PLANS[kind], 5, width=8, dropout=0.0)


def small_slowfast() -> tuple[nn.Module, nn.Module]:
    pools = ((4, 2, 2), (16, 2, 2))
    theirs = create_slowfast(
        model_depth=18, stem_dim_outs=(16, 2), model_num_class=5, dropout_rate=0.0, head_pool_kernel_sizes=pools
    )
    return theirs, SlowFast(5, depths=(1, 1, 1, 1), width=16, dropout=0.0)


def small_x3d() -> tuple[nn.Module, nn.Module]:
    """With torch's own SiLU: the backward of theirs uses what newer versions of torch no longer have."""
    theirs = create_x3d(
        input_clip_length=4,
        input_crop_size=64,
        model_num_class=5,
        dropout_rate=0.0,
        width_factor=1.0,
        depth_factor=1.0,
        inner_act=nn.SiLU,
        head_dim_out=32,
        head_activation=None,
    )
    return theirs, X3D(5, depths=(1, 2, 5, 3), widths=(16, 24, 48, 96), num_inner=32, dropout=0.0)


SMALL: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], int]] = {
    "slow_r50": (partial(small_single, "slow"), 8),
    "c2d_r50": (partial(small_single, "c2d"), 8),
    "i3d_r50": (partial(small_single, "i3d"), 8),
    "slowfast_r50": (small_slowfast, 16),
    "x3d_s": (small_x3d, 4),
}
"""Name -> (theirs, ours) made small, frames."""


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_small_nets_equal_in_value_and_in_every_gradient(name: str, is_training: bool) -> None:
    make, num_frames = SMALL[name]
    theirs, ours = (net.double().train(is_training) for net in make())
    load_state(ours, mapped(name, randomised(theirs).state_dict()), origin="pytorchvideo")
    given, again = (clip_of(num_frames, 64, 64).requires_grad_() for _ in range(2))
    expected, actual = fed(name, theirs, given), ours(again)
    assert expected.std() > 0.01
    close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-10)  # float64, sums in another order
    close(actual, expected)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).reshape(expected.shape)
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    close(again.grad, given.grad)
    gradients = mapped(name, {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None})
    assert gradients.keys() == {key for key, _ in ours.named_parameters()}
    for key, parameter in ours.named_parameters():
        close(parameter.grad, gradients[key], msg=lambda m, k=key: f"{k}: {m}")
    statistics = mapped(name, theirs.state_dict())
    for key, value in ours.state_dict().items():
        close(value, statistics[key], msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("suffix", ["", "_causal"])
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_a_file_has_its_place(name: str, suffix: str) -> None:
    with torch.device("meta"):
        state = getattr(hub, name)().state_dict()
        own = create_model(name + suffix).state_dict()
    given = mapped(name, state)
    assert len(given) == len(state) == len(own)
    assert {key: value.shape for key, value in given.items()} == {key: value.shape for key, value in own.items()}


@pytest.mark.parametrize("name", ["slow_r50", "slowfast_r50", "x3d_s"])
def test_the_key_map_keeps_every_norm(name: str) -> None:
    theirs, ours = SMALL[name][0]()
    state = randomised(theirs).state_dict()
    load_state(ours, mapped(name, state), origin="pytorchvideo")

    def norms(tensors: Mapping[str, Tensor]) -> list[float]:
        return sorted(float(value.double().norm()) for value in tensors.values())

    assert norms(ours.state_dict()) == norms(state)
    assert mapped(name, ours.state_dict()).keys() == ours.state_dict().keys()  # its own keys stay


@torch.no_grad()
def test_x3d_s_at_its_own_size_from_a_file(tmp_path: Path) -> None:
    """Written as the published files are; 13 frames of 160 x 160, where the last pooling of theirs is whole."""
    theirs = randomised(hub.x3d_s(head_activation=None)).eval()
    torch.save({"model_state": theirs.state_dict()}, tmp_path / "X3D_S.pyth")
    ours = create_model("x3d_s", weights=tmp_path / "X3D_S.pyth")
    clip = clip_of(13, 160, 160, torch.float32)[:1]
    expected = theirs(clip.transpose(1, 2))
    assert expected.std() > 0.01
    torch.testing.assert_close(ours(clip), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["slowfast_r50", "i3d_r50"])
@torch.no_grad()
def test_r50_at_full_width(name: str) -> None:
    """All channels and blocks; frames of 64 x 64, with poolings of theirs to match."""
    pools: dict[str, Any] = {"head_pool_kernel_size": (4, 2, 2)}
    if name == "slowfast_r50":
        pools = {"head_pool_kernel_sizes": ((4, 2, 2), (16, 2, 2))}
    theirs = randomised(getattr(hub, name)(**pools)).eval()
    ours = create_model(name)
    load_state(ours, mapped(name, theirs.state_dict()), origin="pytorchvideo")
    clip = clip_of(16 if name == "slowfast_r50" else 8, 64, 64, torch.float32)[:1]
    expected = fed(name, theirs, clip)
    assert expected.std() > 0.01
    torch.testing.assert_close(ours(clip), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_published_size(name: str) -> None:
    options = {"head_activation": None} if name.startswith("x3d") else {}
    theirs = randomised(getattr(hub, name)(**options)).eval()
    ours = create_model(name)
    load_state(ours, mapped(name, theirs.state_dict()), origin="pytorchvideo")
    spec = ours.sidestream_info.input_spec
    clip = clip_of(spec.num_frames, *spec.size_px, torch.float32)[:1]
    expected = fed(name, theirs, clip)
    torch.testing.assert_close(ours(clip), expected, rtol=0, atol=1e-4)
