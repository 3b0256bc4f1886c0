"""Temporal shift: some channels come from the frame before, and offline also from the one after.

TSM, Lin, Gan, Han (ICCV 2019): sections 3.2 (offline, both ways) and 3.3 (online, one way).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sidestream.errors import ModelError
from sidestream.nn.steppable import Steppable
from sidestream.nn.window import Window, Windowed


class OnlineShift(Steppable):
    """The first ``share`` of the channels is replaced by those of the previous frame (zeros before the first).

    State: the kept channels of the last frame, shape (B, C * share, H, W).
    """

    def __init__(self, share: float = 0.125) -> None:
        super().__init__()
        if not 0.0 <= share <= 1.0:
            raise ModelError(f"{share = } is not a share of the channels; it must lie between 0 and 1")
        self.share = share

    def init_state(self, frame_BCHW: Tensor) -> Tensor:
        return torch.zeros_like(frame_BCHW[:, : self._num_shifted(frame_BCHW.shape[1])])

    def step(self, frame_BCHW: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        num_shifted = state.shape[1]
        # A copy, so that the state does not change when somebody works on the frame in place, nor keeps all of it.
        return torch.cat([state, frame_BCHW[:, num_shifted:]], dim=1), frame_BCHW[:, :num_shifted].clone()

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        num_shifted = self._num_shifted(clip_BTCHW.shape[2])
        early = torch.zeros_like(clip_BTCHW[:, :1, :num_shifted])
        shifted = torch.cat([early, clip_BTCHW[:, :-1, :num_shifted]], dim=1)
        return torch.cat([shifted, clip_BTCHW[:, :, num_shifted:]], dim=2)

    def _num_shifted(self, num_channels: int) -> int:
        return int(num_channels * self.share)


class TemporalShift(Windowed):
    """The first 1/``num_div`` of the channels comes from the next frame, the second from the previous one.

    Zeros stand for the frames before the first and after the last. Delay 1: a stream waits for the next frame.
    """

    def __init__(self, num_div: int = 8) -> None:
        super().__init__(Window(3, left=1, right=1))
        if num_div < 2:
            raise ModelError(f"{num_div = } leaves no room for two shares of the channels; give 2 or more")
        self.num_div = num_div

    def slide(self, padded_BCTHW: Tensor) -> Tensor:
        fold = padded_BCTHW.shape[1] // self.num_div
        later = padded_BCTHW[:, :fold, 2:]
        earlier = padded_BCTHW[:, fold : 2 * fold, :-2]
        return torch.cat([later, earlier, padded_BCTHW[:, 2 * fold :, 1:-1]], dim=1)

    def extra_repr(self) -> str:
        return f"num_div={self.num_div}"
