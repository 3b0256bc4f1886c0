"""VGG-8 and the small CNN: equal to their layers written out, one stage per layer, any size, as a clip and a stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contract import check_streaming_layer
from sidestream.circuit.build_stages import stages_of
from sidestream.errors import LayoutError, ModelError, WeightsError
from sidestream.models import create_model, model_info
from sidestream.models.vgg8 import ShiftedNet, names, simple_cnn, vgg8


def random_clip(num_frames: int = 2, size_px: int = 32, num_clips: int = 2) -> Tensor:
    shape = (num_clips, num_frames, 3, size_px, size_px)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_vgg8_is_its_layers() -> None:
    torch.manual_seed(0)
    net = vgg8(6, width=0.125).double()
    clip_BTCHW = random_clip(3, 70).double()
    weights = dict(net.named_parameters())
    x = clip_BTCHW.flatten(0, 1)
    for n in range(1, 6):
        conv = F.conv2d(x, weights[f"net.conv{n}.0.weight"], weights[f"net.conv{n}.0.bias"], padding=1)
        x = F.max_pool2d(conv.clamp(min=0), 2)
    assert x.shape[1:] == (64, 2, 2)
    torch.testing.assert_close(net.features(clip_BTCHW).flatten(0, 1), x)
    x = x.mean((2, 3))
    for name in ("fc6.2", "fc7.1", "fc8.1"):
        x = x.clamp(min=0) @ weights[f"net.{name}.weight"].T + weights[f"net.{name}.bias"]
    torch.testing.assert_close(net.answers(clip_BTCHW).flatten(0, 1), x)
    torch.testing.assert_close(net(clip_BTCHW), x.unflatten(0, (2, 3)).mean(1))


@torch.no_grad()
def test_simple_cnn_is_its_layers() -> None:
    torch.manual_seed(0)
    net = simple_cnn(6, width=0.25).double()
    clip_BTCHW = random_clip(2, 34).double()
    weights = dict(net.named_parameters())
    x = clip_BTCHW.flatten(0, 1)
    for n, (stride, padding) in enumerate([(4, 2), (1, 1), (1, 1), (1, 1)], start=1):
        parts = weights[f"net.conv{n}.0.weight"], weights[f"net.conv{n}.0.bias"]
        x = F.conv2d(x, *parts, stride=stride, padding=padding).clamp(min=0)
    x = x.mean((2, 3)) @ weights["net.fc5.2.weight"].T + weights["net.fc5.2.bias"]
    torch.testing.assert_close(net.answers(clip_BTCHW).flatten(0, 1), x)


@torch.no_grad()
def test_shifted_net_is_its_layers_with_shifts() -> None:
    """Before each convolution but the first, an eighth of the channels is the frame before's."""
    torch.manual_seed(0)
    net = ShiftedNet(vgg8(6, width=0.25)).double()
    clip_BTCHW = random_clip(4, 64).double()
    rows_BTN = []
    held: dict[int, Tensor] = {}
    for t in range(4):
        x = clip_BTCHW[:, t]
        for n, layer in enumerate(net.net):
            if 0 < n < 5:
                num_shifted = x.shape[1] // 8
                kept = x[:, :num_shifted].clone()
                x = torch.cat([held.get(n, torch.zeros_like(kept)), x[:, num_shifted:]], 1)
                held[n] = kept
            x = layer(x)
        rows_BTN.append(x)
    torch.testing.assert_close(net.answers(clip_BTCHW), torch.stack(rows_BTN, 1))
    assert not hasattr(net, "depth_modules")


def test_shifted_net_streams() -> None:
    torch.manual_seed(0)
    net = ShiftedNet(simple_cnn(4, width=0.25)).double()
    check_streaming_layer(net.streaming(), random_clip(5, 32).double())


@pytest.mark.parametrize(("name", "num_stages"), [("vgg8", 8), ("vgg8_quarter_bn", 8), ("simple_cnn_bn", 5)])
@torch.no_grad()
def test_every_layer_is_a_stage(name: str, num_stages: int) -> None:
    net: Any = create_model(name, num_classes=3)
    modules = net.depth_modules()
    assert len(modules) == num_stages
    assert all(any(p.ndim > 1 for p in module.parameters()) for module in modules)
    assert [id(p) for m in modules for p in m.parameters()] == [id(p) for p in net.parameters()]
    frame_BCHW = random_clip()[:, 0]
    assert torch.equal(stages_of(modules, frame_BCHW)(frame_BCHW), net.answers(frame_BCHW.unsqueeze(1))[:, 0])
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == name.endswith("_bn")


def test_streams_as_the_clip_form() -> None:
    torch.manual_seed(0)
    model = vgg8(3, width=0.05, batch_norm=True).double().eval()
    check_streaming_layer(model.streaming(), random_clip(3, 32, 1).double(), receptive_field=1)
    assert {id(p) for p in model.streaming().parameters()} == {id(p) for p in model.parameters()}
    maps, _ = model.streaming_features().step(random_clip(1)[:, 0].double(), (None,))
    torch.testing.assert_close(maps, model.features(random_clip(1).double())[:, 0])


@torch.no_grad()
def test_sizes_from_32_px_on_and_refusals() -> None:
    for make in (vgg8, simple_cnn):
        net = make(5, width=0.05).eval()
        for size_px in (32, 33, 61):
            assert net(random_clip(1, size_px)).shape == (2, 5)
        with pytest.raises(LayoutError, match="31 x 31 px; it needs 32 px or more"):
            net(random_clip(1, 31))
        with pytest.raises(LayoutError, match=r"expected \(B, T, 3, H, W\)"):
            net(random_clip()[:, 0])
    with pytest.raises(ModelError, match=r"width factor of 0\.001"):
        vgg8(width=0.001)
    with pytest.raises(WeightsError, match="no default weights"):
        create_model("vgg8", weights="default")


def test_names_and_classifier() -> None:
    for name in names():
        info = model_info(name)
        assert (info.input_spec.layout, info.input_spec.min_frames, info.input_spec.causal) == ("BTCHW", 1, True)
        net: Any = create_model(name, num_classes=7)
        classifier = net.get_submodule(net.classifier)
        assert isinstance(classifier, nn.Linear)
        assert classifier.out_features == 7
    count = sum(p.numel() for p in create_model("vgg8").parameters())
    quarter = sum(p.numel() for p in create_model("vgg8_quarter").parameters())
    assert 12 < count / quarter < 16
