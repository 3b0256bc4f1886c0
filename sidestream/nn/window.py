"""Layers that slide a window over time: the arithmetic of the window, and its clip, step and end-of-stream forms.

Answer n of a window with kernel k, stride s, dilation d and ``left`` blank frames before the stream reads the frames

    n*s - left,  n*s - left + d,  ...,  n*s - left + (k-1)*d

so it can be given in step n*s + delay, with delay = (k-1)*d - left. A causal window has left = (k-1)*d. The blank
frames after the stream (``right``) come with ``finish``.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sidestream.errors import LayoutError, ModelError
from sidestream.nn.steppable import Steppable
from sidestream.types import NOTHING


@dataclass(frozen=True, slots=True)
class Window:
    """A sliding window over time, in frames."""

    kernel: int
    stride: int = 1
    dilation: int = 1
    left: int = 0
    """Blank frames before the first frame of a stream."""
    right: int = 0
    """Blank frames after the last one."""

    def __post_init__(self) -> None:
        if min(self.kernel, self.stride, self.dilation) < 1 or min(self.left, self.right) < 0:
            raise ModelError(f"{self} is no window: kernel, stride and dilation begin at 1, padding at 0")
        if max(self.left, self.right) > self.span:
            raise ModelError(f"{self} would look at blank frames only: padding may be at most {self.span = }")

    @classmethod
    def causal(cls, kernel: int, stride: int = 1, dilation: int = 1) -> Window:
        """The window that ends at the frame it belongs to."""
        return cls(kernel, stride, dilation, left=(kernel - 1) * dilation)

    @property
    def span(self) -> int:
        """Frames from the oldest to the newest in the window: what a stream must keep."""
        return (self.kernel - 1) * self.dilation

    @property
    def delay(self) -> int:
        return self.span - self.left

    def num_answers(self, num_frames: int) -> int:
        """Answers for a stream of ``num_frames``, those of ``finish`` included."""
        return max(0, (num_frames + self.left + self.right - self.span - 1) // self.stride + 1)


class Windowed(Steppable):
    """A layer that slides a ``Window`` over time.

    State: ``(kept_BCTHW, num_swallow)``, the last ``span`` frames and the number of frames to swallow before the next
    answer; None for a window of one frame with stride 1. The axes after B are channels, time, and then any.
    """

    def __init__(self, window: Window, *, blank_value: float = 0.0) -> None:
        super().__init__()
        self.window, self.blank_value = window, blank_value
        self.delay_ticks, self.period_ticks = window.delay, window.stride

    @abstractmethod
    def slide(self, padded_BCTHW: Tensor) -> Tensor:
        """The window over frames that are padded already: (B, C, T', H, W), T' of ``Window.num_answers``."""

    def init_state(self, frame_BCHW: Tensor) -> tuple[Tensor, int] | None:
        if self.window.span == 0 and self.window.stride == 1:
            return None
        return self._blank_frames(frame_BCHW.unsqueeze(2), self.window.span), self.window.delay

    def step(self, frame_BCHW: Tensor, state: tuple[Tensor, int] | None) -> tuple[Any, tuple[Tensor, int] | None]:
        if state is None:
            return self.slide(frame_BCHW.unsqueeze(2)).squeeze(2), None
        kept_BCTHW, num_swallow = state
        window_BCTHW = torch.cat([kept_BCTHW, frame_BCHW.unsqueeze(2)], dim=2)
        if num_swallow > 0:
            return NOTHING, (window_BCTHW[:, :, 1:], num_swallow - 1)
        return self.slide(window_BCTHW).squeeze(2), (window_BCTHW[:, :, 1:], self.window.stride - 1)

    def finish(self, state: tuple[Tensor, int] | None) -> tuple[Tensor, ...]:
        """The answers whose windows reach over the end of the stream, blank frames taken for what is not there."""
        answers = []
        for _ in range(self.window.right):
            assert state is not None  # a window of one frame has no padding
            answer, state = self.step(self._blank_frames(state[0][:, :, :1], 1).squeeze(2), state)
            answers += [] if answer is NOTHING else [answer]
        return tuple(answers)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        clip_BCTHW, window = clip_BTCHW.transpose(1, 2), self.window
        if window.num_answers(clip_BCTHW.shape[2]) == 0:
            raise LayoutError(f"a clip of {clip_BCTHW.shape[2]} frames is too short for {window}; give more frames")
        if window.left or window.right:
            before = self._blank_frames(clip_BCTHW, window.left)
            after = self._blank_frames(clip_BCTHW, window.right)
            clip_BCTHW = torch.cat([before, clip_BCTHW, after], dim=2)
        return self.slide(clip_BCTHW).transpose(1, 2)

    def blank(self, frame_BCHW: Tensor) -> Tensor:
        with torch.no_grad():
            return self.slide(self._blank_frames(frame_BCHW.unsqueeze(2), self.window.span + 1)).squeeze(2)

    def _blank_frames(self, like_BCTHW: Tensor, num_frames: int) -> Tensor:
        shape = (*like_BCTHW.shape[:2], num_frames, *like_BCTHW.shape[3:])
        return like_BCTHW.new_full(shape, self.blank_value)


def triple(value: int | tuple[int, ...], name: str) -> tuple[int, int, int]:
    """(time, height, width) from one number or three."""
    three = (value,) * 3 if isinstance(value, int) else tuple(value)
    if len(three) != 3:
        raise ModelError(f"{name}={value!r} must be one number, or three for time, height and width")
    return three
