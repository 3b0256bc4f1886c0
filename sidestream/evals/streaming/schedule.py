"""Which frames a device takes up and when their answers are ready: the simulator of streaming evaluation.

All times are in frames: frame i of the camera arrives at time i. Any number will do, fractions for exact results.

    camera         |0    |1    |2    |3    |4          a device that needs 6/5 of a frame, never idle:
    device         [frame 0][frame 1][frame 2][frame ...
    the best known  .     .     0     1     2          for the query at time i: the latest answer, if any

Li, Wang, Ramanan, "Towards Streaming Perception" (ECCV 2020): the single-device loop (section 3), the rules for when to
wait (appendix B.1) and unlimited devices. ``pipeline`` is not in the paper: it judges depth-parallel nets the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sidestream.errors import InputError

Time = Any
"""A number of frames: int, float or Fraction."""
WaitRule = Callable[[Time, Time], bool]


@dataclass(frozen=True, slots=True)
class Work:
    """One frame taken up: when, and when the answer to it is ready (in whichever tick), in frames."""

    frame_index: int
    start: Time
    ready: Time


ROUNDING = 1e-9
"""Frames: a float so close below a whole number is taken for it, so that 1.2 + 1.2 + ... meets frames as 6/5 does."""


def newest_frame(time: Time) -> int:
    """The last frame that has come by then: floor(time)."""
    return math.floor(time + ROUNDING) if isinstance(time, float) else math.floor(time)


def tail(time: Time) -> Time:
    """The part of a time after the last frame's arrival, 0 or more: ``time - floor(time)``."""
    return max(0, time - newest_frame(time))


def _shrinking_tail(now: Time, runtime: Time) -> bool:
    return runtime > 1 and tail(now + runtime) < tail(now)


POLICIES: dict[str, WaitRule] = {
    "idle-free": lambda now, runtime: False,
    "idle-next": lambda now, runtime: tail(now) > 0,
    "shrinking-tail": _shrinking_tail,
    "half-tail": lambda now, runtime: 2 * tail(now) >= 1,
    "half-next-tail": lambda now, runtime: tail(now) > 0 and 2 * tail(now + runtime) < 1,
}
"""Name -> ``wait(now, runtime)``: with a frame at hand that is tail(now) old, is it better to wait for the next one?

"shrinking-tail": wait when the answer would then come with a smaller tail than the frame has now. "half-tail": wait
when more than half of the time to the next frame is over. "half-next-tail": wait when the answer would come in the
first half of a frame's time.
"""


def one_device(
    num_frames: int, runtimes: Iterable[Time], *, policy: str = "idle-free", expected: Time | None = None
) -> list[Work]:
    """A model on one device, one frame at a time.

    A device that is done takes up the newest frame, unless that was done or the rule says to wait; then the next one.

    Args:
        runtimes: of one frame after the other, in frames; as many as are needed are taken.
        policy: a name of ``POLICIES``.
        expected: the runtime that the rule counts on, in frames; needed by the rules that look ahead.
    """
    if policy not in POLICIES:
        raise InputError(f"unknown scheduling policy {policy!r}; expected one of {', '.join(POLICIES)}")
    if expected is None and policy in ("shrinking-tail", "half-next-tail"):
        raise InputError(f"the policy {policy!r} looks ahead; give expected, the mean runtime in frames")
    wait = POLICIES[policy]
    works: list[Work] = []
    draws = iter(runtimes)
    now: Time = 0
    last: int | None = None
    while (found := _newest(now, last, num_frames)) is not None:
        last, now = found
        if wait(now, expected):
            continue
        runtime = _next_runtime(draws, len(works))
        works.append(Work(last, now, now + runtime))
        now = now + runtime
    return works


def unlimited_devices(num_frames: int, runtimes: Iterable[Time]) -> list[Work]:
    """Every frame is taken up when it arrives, each on a device of its own. In the order of the answers."""
    draws = iter(runtimes)
    works = [Work(frame, frame, frame + _next_runtime(draws, frame)) for frame in range(num_frames)]
    return sorted(works, key=lambda work: (work.ready, work.frame_index))


def pipeline(
    num_frames: int, rows: Iterable[Sequence[Time]], *, lockstep: bool = False, num_ticks: int | None = None
) -> list[Work]:
    """K stages in parallel, each on a different frame: an answer every max(row), each sum(row) old.

    Args:
        rows: the runtimes of the K stages on one frame after the other, in frames. A new frame is taken up when the
            slowest stage would be done with the last one; a stage waits for its input and for itself. Stages that
            work one after the other inside of a tick (a group of a semi-parallel circuit) are one here: their sum.
        lockstep: all stages begin a tick together, when its frame is there and the tick before is over (circuits of
            which all stages read the newest frame). An answer then comes at the end of the ``num_ticks``-th tick.
        num_ticks: ticks from a frame to its answer, both counted (latency_ticks + 1); default: the number of stages.
    """
    draws = iter(rows)
    works: list[Work] = []
    ticks: list[Work] = []
    free: list[Time] = []
    now: Time = 0
    last: int | None = None
    while (found := _newest(now, last, num_frames)) is not None:
        last, now = found
        row = tuple(_next_runtime(draws, len(works)))
        free = free or [now] * len(row)
        time = now
        for stage, runtime in enumerate(row):
            time = free[stage] = max(time, free[stage]) + runtime
        works.append(Work(last, now, time))
        ticks.append(Work(last, now, now + max(row)))
        now = now + max(row)
    return answered_later(ticks, (num_ticks or len(free)) - 1) if lockstep else works


def answered_later(works: Sequence[Work], num_ticks: int) -> list[Work]:
    """Answers that come ``num_ticks`` ticks after their frame was taken up, when that tick's frame has been worked on.

    ``works``: a tick each, in order. The last answers come in ticks without a frame, each as long as the last with one.
    """
    if not works or not num_ticks:
        return list(works)
    ends = [work.ready for work in works]
    for _ in range(num_ticks):
        ends.append(ends[-1] + (works[-1].ready - works[-1].start))
    return [Work(work.frame_index, work.start, ends[n + num_ticks]) for n, work in enumerate(works)]


def _newest(now: Time, last: int | None, num_frames: int) -> tuple[int, Time] | None:
    """The newest frame and when it can be taken up: now, or when the one after ``last`` comes; None after the end."""
    frame = newest_frame(now)
    if frame == last:
        frame += 1
    now = max(now, frame)
    return (frame, now) if frame < num_frames else None


def _next_runtime(draws: Iterator[Any], num_drawn: int) -> Any:
    runtime = next(draws, None)
    if runtime is None:
        raise InputError(f"runtimes ended after {num_drawn}; give an endless iterator (itertools.repeat, profile.draw)")
    if any(part < 0 for part in (runtime if isinstance(runtime, Sequence) else (runtime,))):
        raise InputError(f"a runtime of {runtime} frames; give 0 or more")
    return runtime
