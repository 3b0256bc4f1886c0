"""The two forms of any model on one footing: on a whole clip, and on a stream one frame at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from sidestream.models.info import info_of
from sidestream.nn.combine import PerFrame
from sidestream.nn.sliding import SlidingWindow
from sidestream.nn.steppable import Steppable

StreamKind = Literal["step form", "sliding window"]


class MeanOverFrames(nn.Module):
    """An image model on a clip: ``clip_BTCHW`` -> logits (B, num_classes), the mean over the frames."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.per_frame = PerFrame(model)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self.answers(clip_BTCHW).mean(1)

    def answers(self, clip_BTCHW: Tensor) -> Tensor:
        return self.per_frame(clip_BTCHW)

    def streaming(self) -> Steppable:
        return self.per_frame


@dataclass(frozen=True)
class Forms:
    """A model on clips and on streams."""

    clip: nn.Module
    """``clip_BTCHW`` -> logits (B, num_classes)."""
    stream: Steppable
    """``frame_BCHW`` -> logits (B, num_classes), or nothing."""
    stream_kind: StreamKind
    answers: Callable[[Tensor], Any] | None
    """``clip_BTCHW`` -> logits over time (B, T', num_classes), where the model has such."""
    window: SlidingWindow
    """The clip form on a stream, for comparison; the same as ``stream`` where that is a sliding window."""


def forms_of(model: nn.Module, *, num_frames: int, answer_every: int) -> Forms:
    """``model`` on clips and streams: in its step form where it has ``streaming()``, else over a sliding window of
    ``num_frames`` that answers every ``answer_every`` frames. An image model works frame by frame."""
    info = info_of(model)
    clip: Any = MeanOverFrames(model) if info is not None and info.input_spec.layout == "BCHW" else model
    window = SlidingWindow(clip, num_frames, period_ticks=answer_every).train(model.training)
    if hasattr(clip, "streaming"):
        return Forms(clip, clip.streaming(), "step form", getattr(clip, "answers", None), window)
    return Forms(clip, window, "sliding window", getattr(clip, "answers", None), window)
