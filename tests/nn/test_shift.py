"""Temporal shift against a direct re-statement, to the bit."""

from __future__ import annotations

import pytest
import torch

from sidestream.errors import ModelError
from sidestream.nn.shift import OnlineShift, TemporalShift
from sidestream.nn.steppable import step_through


@pytest.mark.parametrize(("num_channels", "num_div"), [(16, 8), (19, 8), (6, 3), (4, 8)])
def test_both_ways(num_channels: int, num_div: int) -> None:
    clip_BTCHW = torch.rand(2, 5, num_channels, 2, 3)
    fold = num_channels // num_div
    expected = torch.zeros_like(clip_BTCHW)
    for t in range(5):
        for c in range(num_channels):
            source = t + 1 if c < fold else t - 1 if c < 2 * fold else t
            if 0 <= source < 5:
                expected[:, t, c] = clip_BTCHW[:, source, c]
    assert torch.equal(TemporalShift(num_div)(clip_BTCHW), expected)
    assert torch.equal(step_through(TemporalShift(num_div), clip_BTCHW, and_finish=True)[0], expected)
    assert torch.equal(step_through(TemporalShift(num_div), clip_BTCHW)[0], expected[:, :-1])  # the last one is owed


@pytest.mark.parametrize(("num_channels", "share", "num_shifted"), [(16, 1 / 8, 2), (12, 1 / 8, 1), (7, 1 / 4, 1)])
def test_online(num_channels: int, share: float, num_shifted: int) -> None:
    """Of a share that is no whole number of channels the part is left out, as TSM does (``fold = c // n_div``)."""
    clip_BTCHW = torch.rand(1, 4, num_channels, 2, 2)
    expected = clip_BTCHW.clone()
    expected[:, 1:, :num_shifted] = clip_BTCHW[:, :-1, :num_shifted]
    expected[:, 0, :num_shifted] = 0
    assert torch.equal(OnlineShift(share)(clip_BTCHW), expected)
    assert torch.equal(step_through(OnlineShift(share), clip_BTCHW)[0], expected)


def test_too_few_shares_are_refused() -> None:
    with pytest.raises(ModelError, match="num_div = 1 leaves no room"):
        TemporalShift(1)
