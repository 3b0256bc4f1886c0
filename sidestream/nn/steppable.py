"""The streaming contract: a layer with a clip form and a step form that give the same numbers.

    state = layer.init_state(frame_BCHW)              # at the start of a stream
    y, state = layer.step(frame_BCHW, state)          # one frame after the other
    late = layer.finish(state)                        # at its end: what a layer with look-ahead still owes
    clip_y = layer(clip_BTCHW)                        # all frames at once

``clip_y[:, n]`` equals the ``y`` of step ``n * period_ticks + delay_ticks``; every other step answers ``NOTHING``.
So all answers of the steps that are not ``NOTHING``, then those of ``finish``, are ``clip_y``, in order:

    kernel 3, stride 2, one zero frame before and after (delay 1, period 2), 5 frames
    step         0    1    2    3    4   finish
    answer       .    y0   .    y1   .   y2

State is a value: ``step`` and ``finish`` change neither the state nor the frame they are given, so an old state stays
valid, and two streams never meet. What is done to a frame or an answer afterwards does not change a state either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.errors import ModelError
from sidestream.types import NOTHING


class Steppable(nn.Module, ABC):
    """A layer on streams; causal when ``delay_ticks`` is 0."""

    delay_ticks: int = 0
    """Ticks by which the step form's answer comes later than the frame it belongs to."""
    period_ticks: int = 1
    """Ticks from one answer to the next: 1, or the temporal stride of a layer that swallows frames."""

    @abstractmethod
    def init_state(self, frame_BCHW: Tensor) -> Any:
        """State before the first frame; of ``frame_BCHW`` only shape, type and device count. None: no memory."""

    @abstractmethod
    def step(self, frame_BCHW: Tensor, state: Any) -> tuple[Any, Any]:
        """One frame: ``(answer, next state)``; the answer is ``NOTHING`` when the frame was swallowed."""

    @abstractmethod
    def forward(self, clip_BTCHW: Tensor) -> Any:
        """A whole clip, from a fresh state to the end of the stream."""

    def finish(self, state: Any) -> tuple[Any, ...]:
        """Answers still owed when the stream ends with ``state``: one per time step left, none without look-ahead."""
        return ()

    def blank(self, frame_BCHW: Tensor) -> Any:
        """An answer of which only shape, type and device count: what the next layer will be fed."""
        with torch.no_grad():
            answer, _ = self.step(frame_BCHW, self.init_state(frame_BCHW))
        if answer is NOTHING:
            raise ModelError(f"{type(self).__name__} swallows its first frame, so it must define blank(frame_BCHW)")
        return answer

    def start(self, frame_BCHW: Any) -> tuple[Any, Any]:
        """``(init_state, blank)``; layers made of others find both on one way through them."""
        return self.init_state(frame_BCHW), self.blank(frame_BCHW)


def step_through(
    layer: Steppable, clip_BTCHW: Tensor, state: Any = None, *, and_finish: bool = False
) -> tuple[Tensor, Any]:
    """The slow twin of the clip form: ``(answers of every step, state after the last)``, axis 1 is time.

    ``state``: where the stream goes on; None starts a new one. ``and_finish``: the stream ends with this clip, so that
    the answers of ``finish`` are added (without it, a layer with look-ahead owes its last ones).
    """
    state = layer.init_state(clip_BTCHW[:, 0]) if state is None else state
    answers = []
    for frame_BCHW in clip_BTCHW.unbind(1):
        answer, state = layer.step(frame_BCHW, state)
        answers += [] if answer is NOTHING else [answer]
    answers += layer.finish(state) if and_finish else ()
    if not answers:
        return layer.blank(clip_BTCHW[:, 0]).unsqueeze(1)[:, :0], state
    return torch.stack(answers, dim=1), state
