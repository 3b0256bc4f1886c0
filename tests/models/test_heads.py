"""Heads for keypoints and masks: shapes, streams, gradients, and which models can carry them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from contract import check_streaming_layer
from sidestream.errors import LayoutError, ModelError
from sidestream.models import create_model, info_of
from sidestream.models.heads import DenseHead, DenseModel
from sidestream.models.i3d import I3D
from sidestream.models.recurrent import ImageRecurrent
from sidestream.nn.steppable import step_through


def random_clip(num_frames: int, size_px: int = 32) -> Tensor:
    return torch.randn(1, num_frames, 3, size_px, size_px, generator=torch.Generator().manual_seed(1))


class Steps(nn.Module):
    """A trunk of one convolution, whose maps can be written down."""

    classifier = "fc"
    num_features, stride_px = 6, 8

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 8, stride=8), nn.Linear(6, 9)

    def features(self, clip_BTCHW: Tensor) -> Tensor:
        return self.conv(clip_BTCHW.flatten(0, 1)).unflatten(0, clip_BTCHW.shape[:2])


@pytest.mark.parametrize(("kind", "cells"), [("keypoints", 8), ("masks", 32)])
def test_equals_the_head_on_each_frame_apart(kind: str, cells: int) -> None:
    torch.manual_seed(0)
    model = DenseModel(Steps(), 5, kind=kind, num_inner=4).eval()  # type: ignore[arg-type]
    assert not list(model.trunk.fc.parameters())
    for parameter in model.head.parameters():
        nn.init.normal_(parameter)
    clip = random_clip(3)
    answers = model(clip)
    assert answers.shape == (1, 3, 5, cells, cells)
    transposed, norm, _, last, *_ = model.head
    for t in range(3):
        maps = nn.functional.conv_transpose2d(model.trunk.conv(clip[:, t]), transposed.weight, stride=2, padding=1)
        seen = last(torch.relu(norm(maps)))
        if kind == "masks":
            seen = nn.functional.interpolate(seen, size=(32, 32), mode="bilinear", align_corners=False)
        assert torch.allclose(answers[:, t], seen, atol=1e-6)


def test_a_cell_is_four_pixels_whatever_the_trunk() -> None:
    for stride_px in (4, 8, 16, 32):
        head = DenseHead(3, 2, kind="keypoints", stride_px=stride_px, num_inner=4).eval()
        assert head(torch.randn(1, 3, 64 // stride_px, 64 // stride_px)).shape == (1, 2, 16, 16)


@pytest.mark.parametrize("kind", ["keypoints", "masks"])
def test_streams(kind: str) -> None:
    torch.manual_seed(0)
    trunk = ImageRecurrent(3, backbone=nn.Conv2d(3, 4, 32, stride=32), cell="convgru", hidden_size=4)
    model = DenseModel(trunk, 4, kind=kind, num_inner=4).eval()  # type: ignore[arg-type]
    for parameter in model.head.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.double()
    clip = random_clip(5, 64).double().repeat(2, 1, 1, 1, 1) * torch.tensor([1.0, -0.5]).view(2, 1, 1, 1, 1)
    with torch.no_grad():
        assert torch.allclose(model.streaming()(clip), model(clip))
    check_streaming_layer(model.streaming(), clip)


@torch.no_grad()
def test_temporal_strides_stay_those_of_the_trunk() -> None:
    model = DenseModel(I3D(3, width=0.125, is_causal=True), 4, num_inner=4).eval()
    for parameter in model.head.parameters():
        nn.init.normal_(parameter, std=0.2)
    clip, stream = random_clip(17), model.streaming()
    assert stream.period_ticks == 8
    assert model(clip).shape == (1, 3, 4, 8, 8)
    answers, _ = step_through(stream, clip)
    assert torch.allclose(answers, model(clip), atol=1e-5)


@pytest.mark.parametrize("name", ["tsm_mobilenet_v2_online", "cnn_convgru", "i3d", "timesformer_divided"])
@torch.no_grad()
def test_by_name(name: str) -> None:
    model = create_model(name, num_classes=15, head="keypoints")
    info = info_of(model)
    assert info is not None
    assert (info.task, info.num_classes, info.labels) == ("keypoints", 15, None)
    maps = model(random_clip(9, 64))
    assert maps.shape[2:] == (15, 16, 16)


@pytest.mark.parametrize("kind", ["keypoints", "masks"])
def test_frames_that_are_no_whole_number_of_cells_are_refused(kind: str) -> None:
    model = DenseModel(Steps(), 5, kind=kind, num_inner=4).eval()  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match=r"\(32, 36\) pixels; it takes multiples of 8"):
        model(torch.zeros(1, 2, 3, 32, 36))


def test_refuses_what_has_no_maps() -> None:
    with pytest.raises(ModelError, match="frame_"):
        create_model("torchvision/resnet18", head="keypoints", num_classes=3)
    with pytest.raises(ModelError, match="keypoints, masks"):
        create_model("i3d", head="boxes")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="num_classes"):
        create_model("i3d", head="masks")
