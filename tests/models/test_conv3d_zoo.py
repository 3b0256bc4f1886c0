"""3D models by name equal torchvision's with the same weights; R(2+1)D-50 against the paper's formula."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from sidestream.errors import WeightsError
from sidestream.models import (
    conv3d_zoo,
    create_model,
    info_of,
    input_spec_of,
    labels_of,
    list_models,
    model_info,
    save_weights,
)
from sidestream.models.conv3d_zoo import FROM_TORCHVISION, num_middle

PLAIN = ["c3d", "r3d_18", "mc3_18", "r2plus1d_18", "r2plus1d_50", "s3d"]


def lively(model: nn.Module) -> Any:
    """Weights and statistics that show every mistake."""
    for name, value in model.state_dict().items():
        if value.ndim > 1:
            nn.init.normal_(value, std=(2 / value[0].numel()) ** 0.5)
        elif value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.0) if name.endswith(("weight", "var")) else nn.init.normal_(value, std=0.1)
    return model


def both(name: str) -> tuple[nn.Module, nn.Module]:
    """Ours and torchvision's, with the same weights."""
    torch.manual_seed(7)
    ours = lively(create_model(name, num_classes=11))
    theirs = torchvision.models.get_model(name, num_classes=11).eval()
    theirs.load_state_dict(ours.weights_target.state_dict(), strict=True)
    return ours, theirs


def moving_clip(num_frames: int, px: int) -> Tensor:
    return torch.randn(1, num_frames, 3, px, px, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("name", "num_frames", "px"),
    [
        ("r3d_18", 8, 48),
        ("r3d_18", 5, 33),
        ("mc3_18", 8, 48),
        ("r2plus1d_18", 7, 48),
        ("s3d", 14, 224),
        ("s3d", 21, 209),
    ],
)
@torch.no_grad()
def test_logits_equal_torchvision(name: str, num_frames: int, px: int) -> None:
    ours, theirs = both(name)
    expected = theirs(moving_clip(num_frames, px).transpose(1, 2))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(ours(moving_clip(num_frames, px)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "num_frames"), [("r3d_18", 5), ("mc3_18", 3), ("r2plus1d_18", 5), ("s3d", 14)])
def test_gradients_equal_torchvision(name: str, num_frames: int) -> None:
    """Of the input and of every parameter, in float64, where only mistakes differ."""
    nets = [net.double() for net in both(name)]
    if name == "s3d":  # its last pooling wants maps of 7 x 7 places; here they have 1 x 1
        nets[1].avgpool = nn.AvgPool3d((2, 1, 1), stride=1)
    given = moving_clip(num_frames, 32).double().requires_grad_()
    results = []
    for net, clip in zip(nets, (given, given.transpose(1, 2)), strict=True):
        logits, parameters = net(clip), dict(net.named_parameters())
        weights = torch.linspace(-1, 2, logits.shape[1], dtype=torch.float64)
        results.append([logits, *torch.autograd.grad((logits * weights).sum(), [given, *parameters.values()])])
    keys = ["logits", "clip", *(name for name, _ in nets[1].named_parameters())]
    for key, mine, expected in zip(keys, *([x.detach() for x in r] for r in results), strict=True):
        assert expected.any(), key
        # sums in another order, relative to the largest entry: deep sums cancel
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max()), msg=key)


@pytest.mark.parametrize("name", FROM_TORCHVISION)
def test_torchvision_files_load_strictly(name: str, tmp_path: Path) -> None:
    theirs = torchvision.models.get_model(name, num_classes=3)
    torch.save(theirs.state_dict(), tmp_path / "published.pth")
    for variant in (name, f"{name}_causal"):
        ours = create_model(variant, num_classes=3, weights=tmp_path / "published.pth")
        for key, value in theirs.state_dict().items():
            assert torch.equal(ours.weights_target.state_dict()[key], value)
    saved = save_weights(ours, tmp_path / "saved.safetensors")
    theirs.load_state_dict(create_model(name, num_classes=3, weights=saved).weights_target.state_dict(), strict=True)
    with pytest.raises(WeightsError, match=r"2 of another shape: (fc|classifier\.1)\.weight"):
        create_model(name, weights=saved)


def test_names_and_what_they_want() -> None:
    assert conv3d_zoo.names() == [full for name in PLAIN for full in (name, f"{name}_causal")]
    assert set(conv3d_zoo.names()) <= set(list_models())
    for name in PLAIN:
        own, causal = model_info(name), model_info(f"{name}_causal")
        assert (own.num_classes, own.labels[399], own.input_spec.layout) == (400, "zumba", "BTCHW")
        assert causal.default_weights is None
        assert not own.input_spec.causal
        assert (causal.input_spec.causal, causal.input_spec.min_frames, causal.input_spec.delay_ticks) == (True, 1, 0)
        if name in FROM_TORCHVISION:
            theirs = model_info(f"torchvision/{name}")
            assert own.default_weights == theirs.default_weights
            changed = {"min_frames": own.input_spec.min_frames, "delay_ticks": own.input_spec.delay_ticks}
            assert own.input_spec == theirs.input_spec.replace(**changed)
    assert (model_info("c3d").input_spec.num_frames, model_info("c3d").input_spec.size_px) == (16, (112, 112))


@pytest.mark.parametrize("name", conv3d_zoo.names())
def test_the_info_is_that_of_the_net(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=3)
    spec, stream = input_spec_of(model), model.streaming()
    assert spec.delay_ticks == stream.delay_ticks == input_spec_of(stream).delay_ticks
    assert spec.min_frames == model.min_frames
    assert (input_spec_of(stream).layout, input_spec_of(stream).min_frames) == ("BCHW", None)
    assert (info_of(model).num_classes, labels_of(model)) == (3, None)
    head = model.get_submodule(model.classifier)
    assert 3 in {p.shape[0] for p in head.parameters()}


def test_default_weights_come_from_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which weights the hub is asked for; nothing is fetched."""
    asked, make = {}, torchvision.models.get_model

    def loader(name: str, *, weights: Any, progress: bool) -> nn.Module:
        asked[name] = weights
        return make(name, weights=None)

    monkeypatch.setattr(torchvision.models, "get_model", loader)
    for name in FROM_TORCHVISION:
        assert labels_of(create_model(name, weights="default"))[0] == "abseiling"
        assert asked[name] is torchvision.models.get_model_weights(name).DEFAULT
    for name in ("c3d", "r2plus1d_50", "r3d_18_causal", "s3d_causal"):
        with pytest.raises(WeightsError, match=f"{name} has no default weights; give a local"):
            create_model(name, weights="default")
        with pytest.raises(WeightsError, match=f"{name} has no default weights; give a local"):
            conv3d_zoo.build_default(name)


# R(2+1)D-50.


def test_middle_channels_are_those_of_the_formula() -> None:
    """By hand: 3 * 9 * 64 * 64 / (9 * 64 + 3 * 64) = 144; the parameters come out as those of 3 x 3 x 3."""
    assert [num_middle(c, c) for c in (64, 128, 256, 512)] == [144, 288, 576, 1152]
    assert num_middle(64, 128) == 230
    assert num_middle(3, 64, px=7) == 83
    with torch.device("meta"):
        net = create_model("r2plus1d_50").weights_target
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    seen = set()
    for n, num_blocks in enumerate((3, 4, 6, 3), start=1):
        inner = 32 * 2**n
        assert f"layer{n}.{num_blocks}.conv1.0.weight" not in shapes
        for block in range(num_blocks):
            key, middle = f"layer{n}.{block}.conv2.0", 27 * inner**2 // (9 * inner + 3 * inner)
            assert shapes[f"{key}.0.weight"] == (middle, inner, 1, 3, 3)
            assert shapes[f"{key}.3.weight"] == (inner, middle, 3, 1, 1)
            seen.add(key)
    assert len(seen) == 16 == sum(bool(re.fullmatch(r"layer\d\.\d\.conv2\.0\.0\.weight", key)) for key in shapes)


def test_number_of_parameters_by_hand() -> None:
    def unit(out: int, fan_in: int) -> int:
        return out * fan_in + 2 * out  # weights of a convolution, gain and shift of its norm

    total, channels = unit(45, 3 * 49) + unit(64, 45 * 3), 64
    for inner, num_blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        middle = 27 * inner**2 // (12 * inner)
        for block in range(num_blocks):
            total += unit(inner, channels) + unit(middle, 9 * inner) + unit(inner, 3 * middle) + unit(4 * inner, inner)
            total += unit(4 * inner, channels) if block == 0 else 0
            channels = 4 * inner
    total += 400 * (2048 + 1)
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model("r2plus1d_50").parameters()) == total == 46_985_057


def slow_bottleneck(x: Tensor, state: dict[str, Tensor], key: str, stride: int) -> Tensor:
    def unit(x: Tensor, conv: str, norm: str, stride: tuple[int, ...] = (1, 1, 1)) -> Tensor:
        weight = state[f"{key}.{conv}.weight"]
        x = F.conv3d(x, weight, stride=stride, padding=[size // 2 for size in weight.shape[2:]])
        parts = ("running_mean", "running_var", "weight", "bias")
        mean, var, gain, shift = (state[f"{key}.{norm}.{part}"].reshape(-1, 1, 1, 1) for part in parts)
        return (x - mean) / (var + 1e-5).sqrt() * gain + shift

    y = unit(x, "conv1.0", "conv1.1").relu()
    y = unit(y, "conv2.0.0", "conv2.0.1", (1, stride, stride)).relu()
    y = unit(y, "conv2.0.3", "conv2.1", (stride, 1, 1)).relu()
    y = unit(y, "conv3.0", "conv3.1")
    skip = unit(x, "downsample.0", "downsample.1", (stride,) * 3) if f"{key}.downsample.0.weight" in state else x
    return (y + skip).relu()


@torch.no_grad()
def test_bottlenecks_equal_a_plain_restatement() -> None:
    """The whole trunk behind the stem, block by block, in float32."""
    torch.manual_seed(3)
    model = lively(create_model("r2plus1d_50", num_classes=2))
    state, clip_BTCHW = model.weights_target.state_dict(), moving_clip(5, 24)
    expected = model.weights_target.stem(clip_BTCHW.transpose(1, 2))
    for n, num_blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(num_blocks):
            expected = slow_bottleneck(expected, state, f"layer{n}.{block}", 2 if n > 1 and block == 0 else 1)
    maps = model.features(clip_BTCHW)
    assert maps.shape == (1, 1, 2048, 2, 2)
    # float32 sums in another order through 49 layers, relative to the largest value
    torch.testing.assert_close(maps.transpose(1, 2), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
