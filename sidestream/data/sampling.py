"""Which frames make a clip: pure arithmetic on the presentation times of the frames that were really decoded.

Every s-th decoded frame (header counts and nominal rates are never believed), or, where a frame rate is asked for,
the frames nearest to moments s / rate seconds apart, so that sources of several rates show the same motion:

    frames                0   1   2   3   4   5   6   7   8
    L=3 s=2, start 1          x       x       x               possible starts are 0 .. 4
    same, at half the rate    x               x               x
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Literal

import numpy as np

Short = Literal["repeat", "loop"]
"""What a stretch that is too short does past its end: hold its last frame, or begin again."""


def possible_starts(
    pts_seconds: Sequence[float], num_frames: int, frame_step: int, frame_rate: float | None = None
) -> int:
    """How many frames a clip can begin with and still end inside (they are the first ones); 1 where it is too short."""
    if frame_rate is None:
        return max(1, len(pts_seconds) - (num_frames - 1) * frame_step)
    latest = pts_seconds[-1] - (num_frames - 1) * frame_step / frame_rate + 0.5 * frame_step / frame_rate
    return max(1, bisect_left(pts_seconds, latest))


def clip_indices(
    pts_seconds: Sequence[float],
    *,
    start: int,
    num_frames: int,
    frame_step: int = 1,
    short: Short = "repeat",
    frame_rate: float | None = None,
) -> list[int]:
    """Indices of the frames of the clip that begins with frame ``start``."""
    if frame_rate is None:
        count = len(pts_seconds)
        wanted = [start + n * frame_step for n in range(num_frames)]
        return [n % count if short == "loop" else min(n, count - 1) for n in wanted]
    moments = [pts_seconds[start] + n * frame_step / frame_rate for n in range(num_frames)]
    if short == "loop":
        half = period_seconds(pts_seconds) / 2  # the last frame lasts as long as the others
        first, length = pts_seconds[0], pts_seconds[-1] - pts_seconds[0] + 2 * half
        moments = [t if t < pts_seconds[-1] + half else first + (t - first + half) % length - half for t in moments]
    return [nearest(pts_seconds, moment) for moment in moments]


def period_seconds(pts_seconds: Sequence[float]) -> float:
    """The median distance of the frames; 1 s for a single frame."""
    if len(pts_seconds) == 1:
        return 1.0
    return median(after - before for before, after in pairwise(pts_seconds))


def nearest(pts_seconds: Sequence[float], moment: float) -> int:
    """The frame with the time nearest to ``moment``; of two the earlier."""
    after = bisect_left(pts_seconds, moment)
    if after == 0:
        return 0
    if after == len(pts_seconds):
        return after - 1
    return after if pts_seconds[after] - moment < moment - pts_seconds[after - 1] else after - 1


def spread_start(num_starts: int, number: int, num_clips: int) -> int:
    """Start of clip ``number`` of ``num_clips`` evenly spread ones, the ends included; a single one is centred."""
    if num_clips == 1:
        return (num_starts - 1) // 2
    return round(number * (num_starts - 1) / (num_clips - 1))


def random_generator(*numbers: int) -> np.random.Generator:
    """A generator that is a function of these numbers (seed, epoch, index ...) and of nothing else."""
    return np.random.default_rng(numbers)
