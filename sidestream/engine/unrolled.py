"""What ``unroll`` gives: the answers of a clip, and what every stage wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Trace:
    """What one stage wrote, in the ticks in which it wrote anything. Held outputs are written again."""

    outputs: tuple[Any, ...]
    """One per output, (B, N, ...) for N ticks."""
    ticks: tuple[int, ...]
    oldest_frames: tuple[int | None, ...]
    """Of each tick: the oldest frame that had a part in it; None where all were repeats of the last."""
    newest_frames: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Unrolled:
    """The answers of a clip, in the order of the frames that they are about."""

    answers: Any
    """In the model's own structure, each tensor (B, N, ...) for N answers."""
    ticks: tuple[int, ...]
    """The tick of each answer. In tick t frame t is the newest of the stream, as long as the clip lasts."""
    frame_indices: tuple[int, ...]
    """The frame that each is about: tick less ``latency_ticks``."""
    oldest_frames: tuple[int, ...]
    newest_frames: tuple[int, ...]
    """The oldest and the newest frame that had a part in each."""
    is_warm_up: tuple[bool, ...]
    traces: tuple[Trace, ...] = ()
    """One per stage, where asked for."""
