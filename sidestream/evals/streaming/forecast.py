"""Forecasting: stale answers moved on to the moment for which they are asked. Boxes and points; the rest stays.

Only answers that were ready by then count, as for the pairing. The forecast itself is taken to cost no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sidestream.evals.streaming.kalman import Track, extrapolate, observe
from sidestream.evals.streaming.log import Answer
from sidestream.evals.streaming.pairing import TIE_SECONDS, Pair, by_clip
from sidestream.evals.streaming.values import Boxes, Points, Value


@dataclass(frozen=True, slots=True)
class Moving:
    """What is known of the moving things after the last answer: its frame, and tracks or the points before it."""

    frame_index: int
    value: Value
    tracks: tuple[Track, ...] = ()
    velocity_P2_px: Any = None
    """Pixels a frame; None after the first answer."""


def see(known: Moving | None, answer: Answer) -> Moving:
    """What is known after one more answer. One to an older frame (devices in parallel) teaches nothing."""
    value, frame = answer.value, answer.frame_index
    dt_frames = frame - known.frame_index if known is not None else 0
    if known is not None and dt_frames <= 0:
        return known
    if isinstance(value, Boxes):
        before = known.tracks if known is not None else ()
        return Moving(frame, value, tuple(observe(before, value, dt_frames)))
    if isinstance(value, Points) and known is not None and isinstance(known.value, Points):
        return Moving(frame, value, velocity_P2_px=(value.points_P2_px - known.value.points_P2_px) / dt_frames)
    return Moving(frame, value)


def value_at(known: Moving, frame: float, *, size_px: tuple[int, int] | None = None) -> Value:
    """The last answer, moved on to ``frame`` at constant velocity; ``size_px`` as in ``kalman.extrapolate``."""
    dt_frames = frame - known.frame_index
    if isinstance(known.value, Boxes):
        return extrapolate(known.tracks, dt_frames, size_px=size_px)
    if isinstance(known.value, Points) and known.velocity_P2_px is not None:
        return replace(known.value, points_P2_px=known.value.points_P2_px + dt_frames * known.velocity_P2_px)
    return known.value


def with_forecast(
    pairs: Sequence[Pair], answers: Sequence[Answer], *, size_px: tuple[int, int] | None = None
) -> list[Pair]:
    """The pairs with each answer moved on from its frame to the truth's.

    ``pairs``: of ``pair(truths, answers)``. ``size_px``: (height, width) of the frames, for boxes.
    """
    answers_of = by_clip(answers)
    moved: list[Pair] = []
    for clip, own in _pairs_by_clip(pairs).items():
        ready = sorted(answers_of.get(clip, []), key=lambda a: (a.ready_seconds, a.frame_index))
        known: Moving | None = None
        number = 0
        for each in own:
            while number < len(ready) and ready[number].ready_seconds <= each.query_seconds + TIE_SECONDS:
                known = see(known, ready[number])
                number += 1
            if each.answer is None or known is None:
                moved.append(each)
                continue
            value = value_at(known, each.truth.frame_index, size_px=size_px)
            moved.append(replace(each, answer=replace(each.answer, value=value)))
    return moved


def _pairs_by_clip(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    found: dict[str, list[Pair]] = {}
    for each in pairs:
        found.setdefault(each.truth.clip, []).append(each)
    return found
