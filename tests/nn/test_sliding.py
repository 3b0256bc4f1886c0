"""A clip model on a stream, by reading its whole window again: the contract, and the windows that it reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract import assert_equal, check_streaming_layer
from sidestream.errors import ModelError
from sidestream.models.i3d import I3D
from sidestream.nn.sliding import SlidingWindow
from sidestream.nn.steppable import step_through
from sidestream.types import NOTHING


class ClipNet(nn.Module):
    """Looks at all frames of a clip, each with a weight of its own."""

    def __init__(self, num_frames: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 2, (num_frames, 3, 3), padding=(0, 1, 1), dtype=torch.float64)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self.conv(clip_BTCHW.transpose(1, 2)).squeeze(2)


def clip(num_frames: int = 7) -> Tensor:
    return torch.rand(2, num_frames, 4, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5


@pytest.mark.parametrize(("num_frames", "period_ticks"), [(1, 1), (3, 1), (3, 2), (4, 3), (9, 2)])
def test_keeps_the_contract(num_frames: int, period_ticks: int) -> None:
    layer = SlidingWindow(ClipNet(num_frames), num_frames, period_ticks=period_ticks)
    check_streaming_layer(layer, clip(), receptive_field=num_frames)


class Told(nn.Module):
    """Answers the frames' first pixels, so that one sees which were read."""

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return clip_BTCHW[:, :, 0, 0, 0]


def test_reads_the_windows_of_the_drawing() -> None:
    frames_BTCHW = torch.arange(5.0).reshape(1, 5, 1, 1, 1)
    layer = SlidingWindow(Told(), 4, period_ticks=2)
    read, state = [], layer.init_state(frames_BTCHW[:, 0])
    for frame_BCHW in frames_BTCHW.unbind(1):
        answer, state = layer.step(frame_BCHW, state)
        read.append(None if answer is NOTHING else answer[0].tolist())
    assert read == [[0, 0, 0, 0], None, [0, 0, 1, 2], None, [1, 2, 3, 4]]


@torch.no_grad()
def test_a_full_window_is_the_clip() -> None:
    net = I3D(5, width=1 / 16).double().eval()
    clip_BTCHW = torch.rand(1, 18, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    answers, _ = step_through(SlidingWindow(net, 16, period_ticks=17), clip_BTCHW)
    assert answers.shape == (1, 2, 5)
    assert_equal(answers[:, 1], net(clip_BTCHW[:, 2:18]))
    assert answers[:, 1].abs().max() > 0


def test_looking_for_the_shape_teaches_no_batch_norm() -> None:
    norm = nn.BatchNorm3d(2)  # takes time for its channels, which is no matter here
    layer = SlidingWindow(norm, 2).train()
    layer.blank(torch.rand(3, 4, 5, 5))
    assert norm.num_batches_tracked == 0
    assert all(m.training for m in layer.modules())


@pytest.mark.parametrize("options", [{"num_frames": 0}, {"num_frames": 3, "period_ticks": 0}])
def test_refuses_no_window(options: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="make no sliding window"):
        SlidingWindow(Told(), **options)
