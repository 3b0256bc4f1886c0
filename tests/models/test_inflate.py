"""Inflation: a 2D net on a frame equals its 3D twin on a still clip, away from the clip's ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from sidestream.errors import WeightsError
from sidestream.models import create_model
from sidestream.models.i3d import I3D
from sidestream.models.inflate import googlenet_keys, inflate, inflate_model


@pytest.mark.parametrize("num_frames", [1, 2, 3, 7])
def test_an_inflated_kernel_answers_a_still_as_the_2d_one(num_frames: int) -> None:
    torch.manual_seed(0)
    weight_OIHW = torch.randn(4, 3, 3, 5, dtype=torch.float64)
    frame_BCHW = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    still_BCTHW = frame_BCHW.unsqueeze(2).expand(-1, -1, num_frames, -1, -1)
    answer = F.conv3d(still_BCTHW, inflate(weight_OIHW, num_frames))
    torch.testing.assert_close(answer.squeeze(2), F.conv2d(frame_BCHW, weight_OIHW), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("shape", "num_frames"), [((4, 3, 3), 2), ((4, 3, 1, 3, 3), 2), ((4, 3, 3, 3), 0)])
def test_what_cannot_be_inflated(shape: tuple[int, ...], num_frames: int) -> None:
    with pytest.raises(WeightsError, match=r"cannot inflate a weight of shape .*4 axes"):
        inflate(torch.zeros(shape), num_frames)


def image_net(num_classes: int) -> Any:
    """torchvision's Inception-v1 with statistics that matter; float64, so that only mistakes differ."""
    torch.manual_seed(3)
    net = torchvision.models.googlenet(aux_logits=False, init_weights=False, num_classes=num_classes)
    for name, value in net.state_dict().items():
        if name.endswith("running_var") or (name.endswith("weight") and value.ndim == 1):
            value.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            value.normal_(0, 0.1)
        elif value.ndim == 4:
            value.normal_(0, (2 / value[0].numel()) ** 0.5)
    return net.double().eval()


@torch.no_grad()
def test_inflated_inception_on_a_still_equals_the_image_net() -> None:
    """At 31 pixels both pad alike ('SAME' and torchvision's 3 + 3 with rounding up differ at even sizes)."""
    image = image_net(11)
    video = inflate_model(I3D(11).double().eval(), image.state_dict(), key_map=googlenet_keys)
    frame_BCHW = torch.randn(1, 3, 31, 31, dtype=torch.float64)
    expected = image(frame_BCHW)
    assert expected.std() > 0.01
    still_BTCHW = frame_BCHW.unsqueeze(1).expand(-1, 112, -1, -1, -1)
    answers = video.answers(still_BTCHW)
    # Answer n sees the frames 8n - 44 to 8n + 62: of 112 frames, only answer 6 sees none beyond the ends.
    torch.testing.assert_close(answers[:, 6], expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(answers[:, 0], expected, rtol=1e-3)


def test_a_fresh_head_is_kept_and_misfits_are_named() -> None:
    state = image_net(11).state_dict()
    video = I3D(7)
    head = {k: v.clone() for k, v in video.state_dict().items() if k.startswith("logits.")}
    inflate_model(video, state, key_map=googlenet_keys, fresh=("logits.",))
    own = video.state_dict()
    assert all(torch.equal(own[k], v) for k, v in head.items())
    stem: Tensor = own["Conv3d_1a_7x7.conv3d.weight"]
    assert torch.equal(stem[:, :, 3], (state["conv1.conv.weight"] / 7).float())
    with pytest.raises(WeightsError, match=r"the weights in the image model do not fit I3D: .*logits\.conv3d\.weight"):
        inflate_model(I3D(7), state, key_map=googlenet_keys)
    with pytest.raises(WeightsError, match="missing: Conv3d_1a_7x7"):
        inflate_model(I3D(7), torchvision.models.resnet18().state_dict(), key_map=googlenet_keys)


def test_a_published_file_with_auxiliary_heads_is_taken() -> None:
    state = create_model("googlenet").state_dict() | {"aux1.fc2.bias": torch.zeros(1000)}
    inflate_model(I3D(1000), state, key_map=googlenet_keys)
