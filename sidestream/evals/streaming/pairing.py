"""Pairing: for every frame's moment, the latest answer that was ready; and how stale those answers were.

Li, Wang, Ramanan, "Towards Streaming Perception" (ECCV 2020), section 3.1: a frame's ground truth is compared with the
last answer that had been made by then, whichever frame it was made from.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sidestream.errors import InputError
from sidestream.evals.streaming.log import Answer, FrameTruth

TIE_SECONDS = 1e-9
"""An answer that is ready within a nanosecond of the query is ready at the query."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How many frames had an answer of their own, of an older frame, or none."""

    num_frames: int
    in_time: int
    """Frames that were paired with their own answer."""
    miss: int
    """Frames before the first answer: an empty one takes its place."""
    mismatch: int
    """Sum of (frame - frame of the answer) over all frames that have one."""

    @property
    def mean_mismatch(self) -> float:
        """Frames by which the answers are stale, on average over the frames that have one."""
        return self.mismatch / max(1, self.num_frames - self.miss)

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.num_frames + other.num_frames,
            self.in_time + other.in_time,
            self.miss + other.miss,
            self.mismatch + other.mismatch,
        )


@dataclass(frozen=True, slots=True)
class Pair:
    """A frame's truth and the answer that it is compared with; None where none was ready."""

    truth: FrameTruth
    answer: Answer | None
    query_seconds: float


def latest_ready(ready: Sequence[Any], queries: Iterable[Any], *, ties_are_ready: bool = True) -> list[int | None]:
    """For each query time the number of the last of ``ready`` that is not later; None where there is none.

    ``ready``: ascending. ``ties_are_ready``: an answer that is ready exactly at the query counts; False: only for the
    next one. Any numbers, exact where they are (fractions).
    """
    place = bisect_right if ties_are_ready else bisect_left
    return [n - 1 if (n := place(ready, query)) else None for query in queries]


def count(frames: Sequence[int], used: Sequence[int | None]) -> Counts:
    """``used``: for each frame the frame of the answer that it was paired with."""
    gaps = [frame - other for frame, other in zip(frames, used, strict=True) if other is not None]
    return Counts(len(frames), gaps.count(0), len(frames) - len(gaps), sum(gaps))


def pair(
    truths: Iterable[FrameTruth], answers: Iterable[Answer], *, eta_frames: float = 0.0, ties_are_ready: bool = True
) -> list[Pair]:
    """Each truth with the latest answer that was ready at t_i = its presentation time - ``eta_frames`` of its clip's.

    Among answers that were ready at the same time the one to the newer frame is the latest. Clips are paired by name.

    Args:
        eta_frames: -1 or more; 0 asks when the frame arrives, -1 when the next one does.

    Raises:
        InputError: eta_frames below -1, two truths of one frame, or an answer to a clip without truth.
    """
    if not eta_frames >= -1:
        raise InputError(f"{eta_frames = }; expected -1 or more (0 asks at the frame's own arrival)")
    truths_of, answers_of = by_clip(truths), by_clip(answers)
    if unknown := sorted(set(answers_of) - set(truths_of)):
        raise InputError(f"answers to {unknown[0]!r} ({len(unknown)} clips), of which there is no truth")
    pairs: list[Pair] = []
    for clip, own in truths_of.items():
        own = sorted(own, key=lambda truth: truth.frame_index)
        ready = sorted(answers_of.get(clip, []), key=lambda a: (a.ready_seconds, a.frame_index))
        queries = query_times(own, eta_frames)
        shift = TIE_SECONDS if ties_are_ready else -TIE_SECONDS
        numbers = latest_ready([a.ready_seconds for a in ready], [q + shift for q in queries])
        pairs += [
            Pair(truth, None if number is None else ready[number], query)
            for truth, number, query in zip(own, numbers, queries, strict=True)
        ]
    return pairs


def counts_of(pairs: Sequence[Pair]) -> Counts:
    """In-time, miss and mismatch of pairs."""
    used = [None if p.answer is None else p.answer.frame_index for p in pairs]
    return count([p.truth.frame_index for p in pairs], used)


def pair_same_frames(truths: Iterable[FrameTruth], answers: Iterable[Answer]) -> list[Pair]:
    """Offline: each truth with the answer to the same frame, whenever that was ready; None where there is none."""
    found = {(a.clip, a.frame_index): a for a in answers}
    return [Pair(t, found.get((t.clip, t.frame_index)), t.pts_seconds) for t in truths]


def query_times(truths: Sequence[FrameTruth], eta_frames: float) -> list[float]:
    """When each frame of one clip is asked for, in seconds; a frame lasts as long as the clip's do on average."""
    if len({truth.frame_index for truth in truths}) < len(truths):
        raise InputError(f"the truth of {truths[0].clip!r} has a frame twice; give each frame once")
    period = frame_seconds(truths) if eta_frames else 0.0
    return [truth.pts_seconds - eta_frames * period for truth in truths]


def frame_seconds(truths: Sequence[FrameTruth]) -> float:
    """Mean time from one frame to the next, seconds; 0 for a single frame."""
    first, last = truths[0], truths[-1]
    num_steps = last.frame_index - first.frame_index
    return (last.pts_seconds - first.pts_seconds) / num_steps if num_steps else 0.0


def by_clip(items: Iterable[Any]) -> dict[str, list[Any]]:
    """Truths or answers by the name of their clip, in order."""
    found: dict[str, list[Any]] = {}
    for item in items:
        found.setdefault(item.clip, []).append(item)
    return found
