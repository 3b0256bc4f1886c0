"""Pooling on streams against torch's own, and against lists of frames."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidestream.nn.pool import AvgPool3d, MaxPool3d, Newest, RunningMean
from sidestream.nn.steppable import step_through


def clip(num_frames: int = 8) -> Tensor:
    return torch.rand(2, num_frames, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 2.0


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        (2, None, 0),
        (3, 2, 1),
        (3, 1, 1),
        ((2, 1, 1), (2, 1, 1), 0),
        ((3, 2, 2), (1, 2, 2), (1, 0, 1)),
        ((1, 3, 3), 2, 0),
    ],
)
@pytest.mark.parametrize("num_frames", [5, 8])
def test_a_stream_equals_torch(kernel: Any, stride: Any, padding: Any, num_frames: int) -> None:
    for ours, torchs in ((MaxPool3d, nn.MaxPool3d), (AvgPool3d, nn.AvgPool3d)):
        layer: Any = ours(kernel, stride=stride, padding=padding)
        expected = torchs(kernel, stride, padding)(clip(num_frames).transpose(1, 2)).transpose(1, 2)
        answers, _ = step_through(layer, clip(num_frames), and_finish=True)
        torch.testing.assert_close(answers, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_causal_pools_by_hand(stride: int) -> None:
    frames, expected_max, expected_mean = clip().unbind(1), [], []
    for t in range(0, 8, stride):
        seen = [frames[i] for i in range(max(0, t - 2), t + 1)]
        expected_max.append(torch.stack(seen).amax(0))  # all are negative: padding with zeros would show
        expected_mean.append(torch.stack(seen).sum(0) / 3)
    for kind, expected in ((MaxPool3d, expected_max), (AvgPool3d, expected_mean)):
        layer: Any = kind((3, 1, 1), stride=(stride, 1, 1), is_causal=True)
        torch.testing.assert_close(step_through(layer, clip())[0], torch.stack(expected, 1), rtol=0, atol=1e-13)


def test_the_running_mean_and_the_newest_by_hand() -> None:
    answers, _ = step_through(RunningMean(), clip())
    for t in range(8):
        torch.testing.assert_close(answers[:, t], clip()[:, : t + 1].mean(1), rtol=0, atol=1e-13)
    assert torch.equal(step_through(Newest(), clip())[0], clip())
    assert torch.equal(step_through(Newest(3), clip())[0], clip()[:, [0, 3, 6]])
