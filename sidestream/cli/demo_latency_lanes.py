"""The two sides of ``sidestream demo --latency``: which frame each stage works on when, and when answers are ready.

Simulated, stage times are measured one after the other on one thread and drawn again, a row of K stages per frame;
every stage then has a worker of its own:

    sequential   frame 0: |s1|s2|s3|                       one frame at a time; the newest one is taken up next
                 frame 2:          |s1|s2|s3|
    pipelined    frame 0: |s1|s2|s3|                       a new frame whenever the slowest stage would be done with
                 frame 1:    |s1|s2|s3|                    the last one; a stage waits for its input and for itself

Live, the engine runs in real time with a worker per stage, and each stage's work is timed as it happens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from sidestream.circuit.wire import Circuit
from sidestream.clock import Clock, WallClock
from sidestream.engine import run
from sidestream.engine.executors.frame_parallel import undelayed
from sidestream.evals.streaming import Answer, RuntimeProfile, Work, run_live
from sidestream.evals.streaming.runtimes import NUM_WARM_UP
from sidestream.evals.streaming.schedule import one_device, pipeline
from sidestream.types import Frame

MIN_MEASURED = 8
"""Frames that are measured at least."""


@dataclass(frozen=True, slots=True)
class Span:
    """A stage at work on a frame. Stages count from 0; seconds from the moment when the first frame was due."""

    stage: int
    frame_index: int
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class Lane:
    """One side of the picture."""

    title: str
    answers: tuple[Answer, ...]
    """In the order in which they were ready."""
    spans: tuple[Span, ...]
    num_stages: int


@dataclass(frozen=True)
class Schedule:
    """A lane before anything is answered."""

    works: tuple[Work, ...]
    """Times in frames."""
    spans: tuple[Span, ...]


Rows = Iterable[tuple[float, ...]]
"""Runtimes of the stages on one frame after the other, in frames."""


def sequential_schedule(num_frames: int, rows: Rows, *, frame_rate: float) -> Schedule:
    """One worker; the newest frame waits, the others are dropped."""
    drawn: list[tuple[float, ...]] = []
    works = one_device(num_frames, (sum(row) for row in _kept(rows, drawn)))
    spans = [span for work, row in zip(works, drawn, strict=True) for span in _in_a_row(work, row)]
    return _schedule(works, spans, frame_rate)


def pipelined_schedule(num_frames: int, rows: Rows, *, frame_rate: float) -> Schedule:
    """A worker per stage. A frame is handed on as soon as the next stage is free."""
    drawn: list[tuple[float, ...]] = []
    works = pipeline(num_frames, _kept(rows, drawn))
    free = [works[0].start] * len(drawn[0])
    spans: list[Span] = []
    for work, row in zip(works, drawn, strict=True):
        ready = work.start
        for stage, runtime in enumerate(row):
            start = max(ready, free[stage])
            ready = free[stage] = start + runtime
            spans.append(Span(stage, work.frame_index, start, ready))
    return _schedule(works, spans, frame_rate)


def predictive_schedule(num_frames: int, rows: Rows, *, frame_rate: float, lags: Sequence[int]) -> Schedule:
    """All stages begin a tick together, stage j on what came up to ``lags[j]`` ticks before; an answer each tick.

    Spans carry the oldest of the frames on which a stage works; before that has come, it works on nothing known.
    """
    drawn: list[tuple[float, ...]] = []
    works = pipeline(num_frames, _kept(rows, drawn), lockstep=True, num_ticks=lags[-1] + 1)
    spans = [
        Span(stage, works[tick - lags[stage]].frame_index, works[tick].start, works[tick].start + runtime)
        for tick, row in enumerate(drawn)
        for stage, runtime in enumerate(row)
        if tick >= lags[stage]
    ]
    return _schedule(works, spans, frame_rate)


def live_lane(
    title: str,
    circuit: Circuit,
    frames: Sequence[Frame],
    *,
    answer: Callable[[Any], Any],
    clip: str,
    executor: str,
    prepare: Any,
    clock: Clock | None = None,
) -> Lane:
    """Really run, in real time, with a worker per stage ("threads") or one for all of them ("inline")."""
    clock = clock or WallClock()
    timed, circuit = _timed(circuit, clock)
    origin: list[float] = []

    def noted(output: Any) -> Any:
        origin.append(output.arrived_at_seconds - output.pts_seconds)
        return answer(output)

    options: dict[str, Any] = {"prepare": prepare, "clock": clock}
    if executor == "threads":
        options["num_threads"] = circuit.num_stages
    answers = run_live(circuit, list(frames), answer=noted, clip=clip, executor=executor, **options)
    spans = [
        Span(stage, given.frame_index, start - origin[0], end - origin[0])
        for stage, step in enumerate(timed)
        for given, (start, end) in zip(answers, step.times, strict=False)
    ]
    return Lane(title, _by_ready(answers), tuple(spans), circuit.num_stages)


def as_lane(title: str, schedule: Schedule, answers: Iterable[Answer], num_stages: int) -> Lane:
    return Lane(title, _by_ready(answers), schedule.spans, num_stages)


def measured(
    circuit: Circuit, frames: Sequence[Frame], *, prepare: Any, seconds: float, clock: Clock | None = None
) -> RuntimeProfile:
    """Runtimes of the stages on one thread: of as many frames as fit into ``seconds``, 8 or more; the first 3 left out.

    ``clock``: what the stages are timed by; default: the processor time of the thread, which other programs on a busy
    machine do not stretch as they stretch the wall clock's.
    """
    timed, circuit = _timed(undelayed(circuit), clock or ThreadClock())  # an answer then costs a step of every stage
    wall = WallClock()

    def fed() -> Iterator[Frame]:
        for number in range(max(MIN_MEASURED, len(frames))):
            if number >= MIN_MEASURED and wall.now() > seconds:
                return
            yield frames[number % len(frames)]

    totals = [
        tuple(step.total_seconds for step in timed) for _ in run(circuit, fed(), executor="inline", prepare=prepare)
    ]
    rows = [tuple(b - a for a, b in zip(*pair, strict=True)) for pair in pairwise(totals)]
    return RuntimeProfile(tuple(rows[NUM_WARM_UP - 1 :]))


class ThreadClock:
    """Processor time of the thread that asks."""

    def now(self) -> float:
        return time.thread_time()

    def sleep_until(self, at_seconds: float) -> None:
        raise NotImplementedError("processor time does not pass while a thread sleeps; use a WallClock")


def _timed(circuit: Circuit, clock: Clock) -> tuple[list[_TimedStep], Circuit]:
    """The circuit with stages that note when they are at work, and those notes."""
    timed = [_TimedStep(stage.step, clock) for stage in circuit.stages]
    stages = tuple(replace(stage, step=step) for stage, step in zip(circuit.stages, timed, strict=True))
    return timed, circuit.replace(stages=stages)


class _TimedStep:
    """A stage's step that notes when it was at work."""

    def __init__(self, step: Callable[..., Any], clock: Clock) -> None:
        self._step, self._clock = step, clock
        self.times: list[tuple[float, float]] = []

    def __call__(self, inputs: Any, state: Any) -> Any:
        start = self._clock.now()
        made = self._step(inputs, state)
        self.times.append((start, self._clock.now()))
        return made

    @property
    def total_seconds(self) -> float:
        return sum(end - start for start, end in self.times)


def _kept(rows: Rows, into: list[tuple[float, ...]]) -> Iterator[tuple[float, ...]]:
    for row in rows:
        into.append(row)
        yield row


def _in_a_row(work: Work, row: tuple[float, ...]) -> Iterator[Span]:
    start = work.start
    for stage, runtime in enumerate(row):
        yield Span(stage, work.frame_index, start, start + runtime)
        start = start + runtime


def _schedule(works: Sequence[Work], spans: Iterable[Span], frame_rate: float) -> Schedule:
    seconds = tuple(
        replace(span, start_seconds=span.start_seconds / frame_rate, end_seconds=span.end_seconds / frame_rate)
        for span in spans
    )
    return Schedule(tuple(works), seconds)


def _by_ready(answers: Iterable[Answer]) -> tuple[Answer, ...]:
    return tuple(sorted(answers, key=lambda a: (a.ready_seconds, a.frame_index)))
