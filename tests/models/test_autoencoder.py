"""The auto-encoders and the net for keypoints: equal to their layers written out, stages, sizes, streams, skips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contract import check_streaming_layer
from sidestream.circuit.build_stages import stages_of
from sidestream.engine import run
from sidestream.errors import CutError, LayoutError, ModelError
from sidestream.models import create_model, model_info, save_weights
from sidestream.models.autoencoder import conv_autoencoder
from sidestream.models.keypoint_cnn import keypoint_cnn
from sidestream.train import with_skips

NAMES = ["conv_autoencoder", "conv_autoencoder_small", "keypoint_cnn"]


def random_clip(num_frames: int = 2, size_px: tuple[int, int] = (16, 32)) -> Tensor:
    return torch.randn((2, num_frames, 3, *size_px), generator=torch.Generator().manual_seed(1)).double()


@torch.no_grad()
def test_the_autoencoder_is_its_layers() -> None:
    torch.manual_seed(0)
    net = conv_autoencoder((5, 7, 9)).double()
    clip_BTCHW, weights = random_clip(), dict(net.named_parameters())
    x = clip_BTCHW.flatten(0, 1)
    for n in (1, 2, 3):
        x = F.conv2d(x, weights[f"net.down{n}.0.weight"], weights[f"net.down{n}.0.bias"], 2, 1).clamp(min=0)
    assert x.shape == (4, 9, 2, 4)
    for n in (4, 5, 6):
        x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
        x = F.conv2d(x, weights[f"net.up{n}.1.weight"], weights[f"net.up{n}.1.bias"], 1, 1)
        x = x.clamp(min=0) if n < 6 else x
    assert x.shape == (4, 3, 16, 32)
    assert (x < 0).any()
    torch.testing.assert_close(net(clip_BTCHW).flatten(0, 1), x)


@torch.no_grad()
def test_the_keypoint_net_is_its_layers() -> None:
    torch.manual_seed(0)
    net = keypoint_cnn(6, width=0.1).double()
    clip_BTCHW, weights = random_clip(), dict(net.named_parameters())
    x = clip_BTCHW.flatten(0, 1)
    for n, (stride, padding) in enumerate([(2, 2), (2, 1), (2, 1), (2, 1), (1, 2)], start=1):
        parts = weights[f"net.conv{n}.0.weight"], weights[f"net.conv{n}.0.bias"]
        x = F.conv2d(x, *parts, stride, padding).clamp(min=0)
    for n in (6, 7):
        x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
        x = F.conv2d(x, weights[f"net.up{n}.1.weight"], weights[f"net.up{n}.1.bias"], 1, 1).clamp(min=0)
    x = F.conv2d(x, weights["net.maps8.0.weight"], weights["net.maps8.0.bias"])
    assert x.shape == (4, 6, 4, 8)
    torch.testing.assert_close(net(clip_BTCHW).flatten(0, 1), x)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_layer_is_a_stage_and_the_stream_is_the_clip(name: str) -> None:
    net: Any = create_model(name)
    clip_BTCHW = random_clip().float()
    modules = net.depth_modules()
    assert len(modules) == (6 if name.endswith("small") else 8)
    x = clip_BTCHW[:, 0]
    for module in modules:
        x = module(x)
    torch.testing.assert_close(x, net.answers(clip_BTCHW)[:, 0])
    stages = stages_of(modules, clip_BTCHW[:, 0])
    torch.testing.assert_close(stages(clip_BTCHW[:, 1]), net(clip_BTCHW)[:, 1])
    owned = [id(p) for module in modules for p in module.parameters()]
    assert sorted(owned) == sorted(id(p) for p in net.parameters())


def test_streaming() -> None:
    torch.manual_seed(0)
    net = conv_autoencoder((4, 5)).double().train()
    clip_BTCHW = random_clip(4, (8, 12))
    check_streaming_layer(net.streaming(), clip_BTCHW)
    torch.testing.assert_close(net.streaming()(clip_BTCHW), net.answers(clip_BTCHW))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("skips", ["concat", "projection"])
@torch.no_grad()
def test_with_skips(name: str, skips: str) -> None:
    """The clip form is the circuit, whose answers see newer frames."""
    torch.manual_seed(0)
    clip_BTCHW = random_clip(5).float()
    net: Any = with_skips(create_model(name), clip_BTCHW[:, 0], skips).eval()
    answers = net.answers(clip_BTCHW)
    outputs = list(run(net.circuit(), list(clip_BTCHW.unbind(1)), executor="inline"))
    torch.testing.assert_close(torch.stack([o.value for o in outputs], 1), answers)
    assert not torch.allclose(answers[:, 1], net.answers(clip_BTCHW[:, 1:2])[:, 0])


def test_add_fits_nowhere() -> None:
    for name in NAMES:
        with pytest.raises(CutError, match="use skips='projection' or 'concat' where shapes differ"):
            with_skips(create_model(name), random_clip()[:, 0].float(), "add")


@pytest.mark.parametrize(("name", "multiple"), [("conv_autoencoder", 16), ("conv_autoencoder_small", 8)])
def test_sizes(name: str, multiple: int) -> None:
    net: Any = create_model(name)
    assert net(torch.zeros(1, 1, 3, 3 * multiple, multiple)).shape == (1, 1, 3, 3 * multiple, multiple)
    with pytest.raises(LayoutError, match=f"frames of 20 x 48 px; it takes multiples of {multiple}"):
        net(torch.zeros(1, 1, 3, 20, 48))
    with pytest.raises(LayoutError, match=r"expected \(B, T, 3, H, W\)"):
        net(torch.zeros(1, 3, 48, 48))


def test_by_name(tmp_path: Path) -> None:
    assert model_info("conv_autoencoder").task == "pictures"
    with pytest.raises(ModelError, match=r"3 channels, but num_classes=7"):
        create_model("conv_autoencoder", num_classes=7)
    with pytest.raises(ModelError, match="give one or more widths"):
        conv_autoencoder(())
    with pytest.raises(ModelError, match="give a larger one"):
        keypoint_cnn(width=0.001)
    clip_BTCHW = random_clip().float()
    net = create_model("keypoint_cnn_bn", num_classes=5, head="keypoints")
    assert net(clip_BTCHW).shape == (2, 2, 5, 4, 8)
    file = save_weights(net, tmp_path / "w.safetensors")
    assert create_model("keypoint_cnn_bn", num_classes=5, weights=file)(clip_BTCHW).equal(net(clip_BTCHW))
