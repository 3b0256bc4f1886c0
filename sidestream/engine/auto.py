"""Picks an executor by measuring: a second of the real circuit on the real input, and a sentence that says why.

On a busy machine, or with a slow model, a trial that has too few answers after ``LIMIT_SECONDS`` ends with those that
it has. It has one at least: an answer that is being made cannot be interrupted, so that the trials take up to that
limit and one answer's time each, however long that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from sidestream.circuit.wire import Circuit
from sidestream.clock import WALL, Clock
from sidestream.engine.executors.frame_parallel import why_not_frame_parallel

CANDIDATES = ("threads", "frame-parallel", "sequential")
"""In the order of the trials: last the one whose operators wait for a core that another program is using."""
LIMIT_SECONDS = 2.0
"""When a trial ends that has fewer answers than it should."""
AT_LEAST = 2
"""Answers of a trial's warm-up, and answers that count."""


@dataclass(frozen=True)
class Trial:
    """What a candidate did on the same frame, over and over."""

    executor: str
    frames_per_second: float
    latency_seconds: float
    setting: str = ""
    """What else was chosen: back end and number of stages."""
    too_few: int = 0
    """Answers that it is judged by, where time was up before there were enough; 0: there were enough."""

    @property
    def name(self) -> str:
        return f"{self.setting}, {self.executor}" if self.setting else self.executor

    @property
    def basis(self) -> str:
        """What it is judged by, where that is little; else nothing."""
        if self.too_few < 0:
            return "by the frames taken, before the first answer"
        return f"by {self.too_few} answer{'s' * (self.too_few > 1)} only" if self.too_few else ""


@dataclass(frozen=True)
class Choice:
    """The executor that was picked, why, and all that was measured."""

    executor: str
    reason: str
    trials: tuple[Trial, ...]


def choose(
    circuit: Circuit,
    item: Any,
    try_run: Callable[[str, Iterator[Any]], Iterator[Any]],
    *,
    frame_rate: float | None = None,
    seconds: float = 1.0,
    clock: Clock = WALL,
) -> Choice:
    """Run each candidate on ``item`` for its share of ``seconds`` (four answers if ``LIMIT_SECONDS`` allow) and pick.

    ``frame_rate``: the rate of a live source. Candidates that keep up with it are ranked by latency; otherwise, and
    where none keeps up, by throughput. ``try_run(executor, items)`` starts a run.
    """
    if any(stage.hides_state and stage.init_buffers is None for stage in circuit.stages):
        return Choice("threads", "the model keeps state in its buffers, which trials would change", ())
    if any(stage.draws for stage in circuit.stages):
        return Choice("sequential", "the model draws random numbers, whose order is the model's in sequence only", ())
    excluded = why_not_frame_parallel(circuit)
    names = [name for name in CANDIDATES if name != "frame-parallel" or excluded is None]
    trials = tuple(
        measure(
            name,
            item,
            try_run,
            seconds / len(names),
            period_ticks=max(s.period_ticks for s in circuit.stages),
            clock=clock,
        )
        for name in names
    )
    best, why = pick(trials, frame_rate)
    note = "" if excluded is None else f"; frame-parallel left out: {excluded}"
    return Choice(best.executor, f"{why}{note}", trials)


def pick(trials: tuple[Trial, ...], frame_rate: float | None) -> tuple[Trial, str]:
    """The best trial and the reason, from plain numbers."""
    keeping_up = [t for t in trials if frame_rate is not None and t.frames_per_second >= 1.05 * frame_rate]
    if keeping_up:
        best = min(keeping_up, key=lambda t: t.latency_seconds)
        return best, f"lowest latency among those that keep up with {frame_rate:g} frames/s"
    best = max(trials, key=lambda t: t.frames_per_second)
    goal = "highest throughput" if frame_rate is None else f"none keeps up with {frame_rate:g} frames/s; fastest"
    return best, goal


class TimeIsUp(BaseException):
    """Ends a trial from inside of its source: a run drains after any other end, which a model that looks ahead makes as
    long as the trial."""


def measure(
    executor: str,
    item: Any,
    try_run: Callable[[str, Iterator[Any]], Iterator[Any]],
    seconds: float,
    *,
    period_ticks: int = 1,
    clock: Clock = WALL,
) -> Trial:
    """Run ``executor`` on the same item over and over: warm up for a quarter of the time, then count for the rest.

    Two answers at least in either part, unless ``LIMIT_SECONDS`` (or ``seconds``, where that is more) are over first:
    then all answers count that there are, and their latency without the first's, where there are more. A model that
    looks so far ahead that there is none by then is judged by the frames that it took.
    """
    taken: list[float] = []
    began = clock.now()
    limit = began + max(LIMIT_SECONDS, seconds)

    def items() -> Iterator[Any]:
        while len(taken) < AT_LEAST + 1 or clock.now() < limit:
            taken.append(clock.now())
            yield item
        raise TimeIsUp

    outputs = try_run(executor, items())
    warm_up, counted, started = _Latencies(), _Latencies(), began
    try:
        warm_up.take(outputs, began + 0.25 * seconds, limit, clock)
        started = clock.now()
        counted.take(outputs, started + 0.75 * seconds, limit, clock)
    except TimeIsUp:
        pass
    ended = clock.now()
    if hasattr(outputs, "close"):
        outputs.close()
    if len(counted.seconds) >= AT_LEAST:
        rate = len(counted.seconds) * period_ticks / (ended - started)
        return Trial(executor, rate, median(counted.seconds))
    if latencies := warm_up.seconds + counted.seconds:
        first, *rest = latencies  # in the first everything is cold
        rate = len(latencies) * period_ticks / (ended - began)
        return Trial(executor, rate, median(rest or [first]), too_few=len(latencies))
    return Trial(executor, (len(taken) - 1) / (ended - taken[0]), ended - began, too_few=-1)


@dataclass
class _Latencies:
    """Of the answers of one part of a trial; those that came count even when the time is up."""

    seconds: list[float] = field(default_factory=list)

    def take(self, outputs: Iterator[Any], deadline: float, limit: float, clock: Clock) -> None:
        """Answers up to ``deadline``; of too few also those up to ``limit``."""
        while clock.now() < (deadline if len(self.seconds) >= AT_LEAST else limit):
            self.seconds.append(next(outputs).latency_seconds)
