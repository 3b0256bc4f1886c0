"""Image encoder + RNN: against torch's cells in a loop, gradients by hand, and itself on streams."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from contract import assert_equal, check_streaming_layer
from sidestream.errors import LayoutError, ModelError
from sidestream.models import create_model, input_spec_of, list_models, model_info, save_weights
from sidestream.models.recurrent import NAMES, ImageRecurrent, detach_state
from sidestream.models.recurrent_encoder import image_encoder
from sidestream.nn.combine import Chain
from sidestream.nn.steppable import step_through

CELLS = list(NAMES.values())
Gradients = list[Tensor]


def tiny(cell: Any) -> ImageRecurrent:
    """Five classes, six hidden channels, an encoder of one convolution; float64."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 4, 3, stride=4, padding=1), nn.Tanh()]
    if cell in ("lstm", "gru"):
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return ImageRecurrent(5, backbone=nn.Sequential(*layers), cell=cell, hidden_size=6).double().eval()


def random_clip(num_frames: int) -> Tensor:
    shape = (2, num_frames, 3, 12, 12)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("cell", CELLS)
def test_stream_equals_clip(cell: Any) -> None:
    check_streaming_layer(tiny(cell).streaming(), random_clip(5), receptive_field=float("inf"))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@torch.no_grad()
def test_features_equal_torch_cells_in_a_loop(cell: Any) -> None:
    model, clip_BTCHW = tiny(cell), random_clip(4)
    make = nn.LSTMCell if cell == "lstm" else nn.GRUCell
    loop = make(16, 6).double()
    loop.load_state_dict({k.removesuffix("_l0"): v for k, v in model.cell.rnn.state_dict().items()})
    state = None
    for t in range(4):
        state = loop(model.backbone(clip_BTCHW[:, t]), state)
        hidden_BD = state[0] if cell == "lstm" else state
        torch.testing.assert_close(model.answers(clip_BTCHW)[:, t], model.head(hidden_BD))
    torch.testing.assert_close(model(clip_BTCHW), model.head(hidden_BD))


@pytest.mark.parametrize("cell", ["convlstm", "convgru"])
@torch.no_grad()
def test_maps_on_a_map_of_one_pixel_equal_the_fully_connected_cell(cell: Any) -> None:
    """With kernels whose middle alone is not zero, every pixel is a fully connected net of its own."""
    model, clip_BTCHW = tiny(cell), random_clip(4)
    for key, value in model.cell.named_parameters():
        if key.endswith("weight"):
            value.copy_(torch.nn.functional.pad(value[:, :, 1:2, 1:2], (1, 1, 1, 1)))
    maps_BTCHW = model.backbone(clip_BTCHW.flatten(0, 1)).unflatten(0, (2, 4))
    pixels_BTCN = maps_BTCHW.flatten(3)
    answers = torch.zeros(2, 4, 5, dtype=torch.float64)
    for n in range(pixels_BTCN.shape[-1]):
        hidden_BTCHW = model.cell(pixels_BTCN[..., n, None, None])
        answers += model.head(hidden_BTCHW[..., 0, 0]) / pixels_BTCN.shape[-1]
    torch.testing.assert_close(model.answers(clip_BTCHW), answers)
    assert_equal(model(clip_BTCHW), model.answers(clip_BTCHW)[:, -1])


def by_chunks(stream: Chain, clip_BTCHW: Tensor, weights_BTN: Tensor, length: int) -> Gradients:
    """Truncated back-propagation through time, as the docstring shows it."""
    stream.zero_grad()
    state = stream.init_state(clip_BTCHW[:, 0])
    for chunk_BTCHW, w_BTN in zip(clip_BTCHW.split(length, 1), weights_BTN.split(length, 1), strict=True):
        answers_BTN, state = step_through(stream, chunk_BTCHW, detach_state(state))
        (answers_BTN * w_BTN).sum().backward()
    return [p.grad.clone() for p in stream.parameters()]  # type: ignore[union-attr]


def tensors(state: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(state) if isinstance(x, Tensor)]


def by_hand(stream: Chain, clip_BTCHW: Tensor, weights_BTN: Tensor, length: int) -> Gradients:
    """One step at a time, last frame first: what a step's state is worth goes to the step before, in its chunk."""
    parameters, tape = list(stream.parameters()), []
    state = stream.init_state(clip_BTCHW[:, 0])
    for frame_BCHW in clip_BTCHW.unbind(1):
        before = pytree.tree_map(lambda x: None if x is None else x.detach().requires_grad_(), state)
        answer_BN, state = stream.step(frame_BCHW, before)
        tape.append((tensors(before), [answer_BN, *tensors(state)]))
    totals = [torch.zeros_like(p) for p in parameters]
    worth = [torch.zeros_like(x) for x in tensors(state)]
    for t in reversed(range(len(tape))):
        before, after = tape[t]
        found = torch.autograd.grad(after, [*parameters, *before], [weights_BTN[:, t], *worth])
        totals = [total + g for total, g in zip(totals, found[: len(parameters)], strict=True)]
        worth = list(found[len(parameters) :])
        if t % length == 0:
            worth = [torch.zeros_like(w) for w in worth]
    return totals


@pytest.mark.parametrize("cell", CELLS)
def test_full_and_truncated_gradients_equal_those_by_hand(cell: Any) -> None:
    model, clip_BTCHW = tiny(cell), random_clip(7)
    weights_BTN = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (model.answers(clip_BTCHW) * weights_BTN).sum().backward()
    full = {id(p): p.grad.clone() for p in model.parameters()}  # type: ignore[union-attr]
    stream = model.streaming()
    for length in (7, 3):
        found = by_chunks(stream, clip_BTCHW, weights_BTN, length)
        for (name, p), ours, theirs in zip(
            stream.named_parameters(), found, by_hand(stream, clip_BTCHW, weights_BTN, length), strict=True
        ):
            torch.testing.assert_close(ours, theirs, msg=lambda m, n=name: f"{n}: {m}")
            is_behind = name.startswith("2.")  # the classifier comes after the state, and loses nothing
            assert torch.allclose(ours, full[id(p)], rtol=1e-6) == (length == 7 or is_behind), name


def test_detach_state_is_a_new_value() -> None:
    leaf = torch.ones(2, requires_grad=True)
    state = (None, (leaf * 2, leaf * 3), 4)
    cut = detach_state(state)
    assert_equal(cut, (None, (torch.full((2,), 2.0), torch.full((2,), 3.0)), 4))
    assert not any(x.requires_grad for x in cut[1])
    assert all(x.requires_grad for x in state[1])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_by_name(name: str, tmp_path) -> None:
    assert name in list_models("cnn_*")
    spec = model_info(name).input_spec
    assert (spec.layout, spec.min_frames, spec.causal, spec.delay_ticks) == ("BTCHW", 1, True, 0)
    model = create_model(name, num_classes=3)
    again = create_model(name, num_classes=3, weights=save_weights(model, tmp_path / "w.safetensors"))
    clip_BTCHW = torch.randn(1, 3, 3, 64, 96)
    answers_BTN, _ = step_through(again.streaming(), clip_BTCHW)
    torch.testing.assert_close(answers_BTN, model.answers(clip_BTCHW), atol=1e-4, rtol=1e-4)
    assert model(clip_BTCHW[:, :2, :, :, :64]).shape == (1, 3)
    assert input_spec_of(model.streaming()).layout == "BCHW"


@torch.no_grad()
def test_torchvision_backbones_give_what_they_pool() -> None:
    frame_BCHW = torch.randn(2, 3, 64, 64)
    torch.manual_seed(0)
    features, num_features = image_encoder("resnet18", as_maps=False)
    maps, num_maps = image_encoder("resnet18", as_maps=True)
    net = torchvision.models.resnet18()
    for encoder in (features, maps):
        encoder.eval()
    net.load_state_dict({**features.state_dict(), "fc.weight": net.fc.weight, "fc.bias": net.fc.bias})
    maps.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("fc.")})
    net.fc = nn.Identity()
    assert_equal(features(frame_BCHW), net.eval()(frame_BCHW))
    assert_equal(maps(frame_BCHW).mean((2, 3), keepdim=True), nn.functional.adaptive_avg_pool2d(maps(frame_BCHW), 1))
    torch.testing.assert_close(maps(frame_BCHW).mean((2, 3)), net(frame_BCHW))
    assert num_features == num_maps == 512


@torch.no_grad()
def test_timm_backbones_give_what_they_pool() -> None:
    features, num_features = image_encoder("timm/resnet10t", as_maps=False)
    maps, num_maps = image_encoder("timm/resnet10t", as_maps=True)
    net = timm.create_model("resnet10t", num_classes=0).eval()
    features.load_state_dict(net.state_dict())
    maps.load_state_dict(net.state_dict())
    frame_BCHW = torch.randn(2, 3, 64, 64)
    assert_equal(features.eval()(frame_BCHW), net(frame_BCHW))
    torch.testing.assert_close(maps.eval()(frame_BCHW).mean((2, 3)), net(frame_BCHW))
    assert num_features == num_maps == 512


def test_the_look_at_a_backbone_leaves_it_as_it_was() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone[0].eval()
    ImageRecurrent(2, backbone=backbone, cell="convgru", hidden_size=3)
    assert_equal(dict(backbone.state_dict()), before)
    assert (backbone.training, backbone[0].training, backbone[1].training) == (True, False, True)


def test_wrong_clips_and_backbones_are_refused() -> None:
    model = tiny("gru")
    with pytest.raises(LayoutError, match=r"expected \(B, T, 3, H, W\).*use transpose\(1, 2\)"):
        model(random_clip(4).transpose(1, 2))
    with pytest.raises(LayoutError, match="0 frames; it needs 1 or more"):
        model(random_clip(4)[:, :0])
    with pytest.raises(ModelError, match="no image model 'resnet19'"):
        ImageRecurrent(backbone="resnet19")
    with pytest.raises(ModelError, match="no maps are known of torchvision's 'squeezenet1_1'"):
        ImageRecurrent(backbone="squeezenet1_1", cell="convgru")
    with pytest.raises(ModelError, match="'squeezenet1_1' has no linear layer at its end"):
        ImageRecurrent(backbone="squeezenet1_1")
    with pytest.raises(ModelError, match=r"Conv2d gives \(1, 4, 224, 224\) for one frame; this cell reads features"):
        ImageRecurrent(backbone=nn.Conv2d(3, 4, 1))
    with pytest.raises(ModelError, match=r"test_vit gives \(1, .*this cell reads maps"):
        ImageRecurrent(backbone="timm/test_vit", cell="convlstm")
