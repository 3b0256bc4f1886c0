"""A clip model on a stream: keeps the newest frames and, at every answer, reads the whole window again.

This is what people do with a network that has no step form, and what a step form is compared with.

    4 frames, an answer every 2 ticks
    step      0          1    2          3    4
    reads     f0 f0 f0 f0     f0 f0 f1 f2     f1 f2 f3 f4
    answer    y0         .    y1         .    y2
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sidestream.errors import ModelError
from sidestream.nn.steppable import Steppable
from sidestream.types import NOTHING

State = tuple[tuple[Tensor, ...], int]


class NewestFrames(Steppable):
    """The newest ``num_frames`` frames as a clip (B, T, ...), every ``period_ticks``.

    Until there are so many, the first frame of the stream is repeated before it. State: ``(frames, num_swallow)``, as
    in ``SlidingWindow``.
    """

    def __init__(self, num_frames: int, *, period_ticks: int = 1) -> None:
        super().__init__()
        if num_frames < 1 or period_ticks < 1:
            raise ModelError(f"{num_frames = } and {period_ticks = } make no sliding window; both begin at 1")
        self.num_frames, self.period_ticks = num_frames, period_ticks

    def init_state(self, frame_BCHW: Tensor) -> State:
        return (), 0

    def step(self, frame_BCHW: Tensor, state: State) -> tuple[Any, State]:
        frames, num_swallow = state
        newest = frame_BCHW.clone()  # the frame may be changed by its owner
        frames = (*frames[1:], newest) if frames else (newest,) * self.num_frames
        if num_swallow > 0:
            return NOTHING, (frames, num_swallow - 1)
        return torch.stack(frames, dim=1), (frames, self.period_ticks - 1)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        """(B, T', num_frames, ...), one window per answer."""
        places = range(0, clip_BTCHW.shape[1], self.period_ticks)
        return torch.stack([self.window(clip_BTCHW, t) for t in places], dim=1)

    def window(self, clip_BTCHW: Tensor, newest: int) -> Tensor:
        """What is read when frame ``newest`` has come."""
        places = torch.arange(newest - self.num_frames + 1, newest + 1, device=clip_BTCHW.device)
        return clip_BTCHW.index_select(1, places.clamp(min=0))


class SlidingWindow(Steppable):
    """``model``, which reads ``clip_BTCHW``, on a stream: an answer every ``period_ticks`` about the newest frame.

    Each answer is ``model`` on the newest ``num_frames`` frames, so it costs a whole clip and comes without delay.
    Until the window is full, the first frame of the stream is repeated before it.
    Its clip form gives the same answers for a whole video, one window after the other.

    State: ``(frames, num_swallow)``: the newest ``num_frames`` frames (none before the first), and the number of
    frames to swallow before the next answer. Raises ``ModelError`` for a window or a period below 1.
    """

    def __init__(self, model: nn.Module, num_frames: int, *, period_ticks: int = 1) -> None:
        super().__init__()
        self.model, self.num_frames, self.period_ticks = model, num_frames, period_ticks
        self.newest = NewestFrames(num_frames, period_ticks=period_ticks)

    def init_state(self, frame_BCHW: Tensor) -> State:
        return self.newest.init_state(frame_BCHW)

    def step(self, frame_BCHW: Tensor, state: State) -> tuple[Any, State]:
        clip_BTCHW, state = self.newest.step(frame_BCHW, state)
        return (NOTHING if clip_BTCHW is NOTHING else self.model(clip_BTCHW)), state

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        num_frames = clip_BTCHW.shape[1]
        answers = [self.model(self.newest.window(clip_BTCHW, t)) for t in range(0, num_frames, self.period_ticks)]
        return torch.stack(answers, dim=1)

    def blank(self, frame_BCHW: Tensor) -> Any:
        """As in evaluation mode, so that looking for the shape does not teach a batch norm."""
        modes = [m for m in self.modules() if m.training]
        try:
            for module in modes:
                module.training = False
            return super().blank(frame_BCHW)
        finally:
            for module in modes:
                module.training = True
