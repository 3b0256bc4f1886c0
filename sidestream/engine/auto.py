"""Picks an executor by measuring: a second of the real circuit on the real input, and a sentence that says why."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from sidestream.circuit.wire import Circuit
from sidestream.engine.executors.frame_parallel import why_not_frame_parallel

CANDIDATES = ("sequential", "threads", "frame-parallel")


@dataclass(frozen=True)
class Trial:
    """What a candidate did on the same frame, over and over."""

    executor: str
    frames_per_second: float
    latency_seconds: float
    setting: str = ""
    """What else was chosen: back end and number of stages."""

    @property
    def name(self) -> str:
        return f"{self.setting}, {self.executor}" if self.setting else self.executor


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
) -> Choice:
    """Run each candidate on ``item`` for its share of ``seconds`` (four answers at least) and pick.

    ``frame_rate``: the rate of a live source. Candidates that keep up with it are ranked by latency; otherwise, and
    where none keeps up, by throughput. ``try_run(executor, items)`` starts a run.
    """
    if any(stage.hides_state for stage in circuit.stages):
        return Choice("threads", "the model keeps state in its buffers, which trials would change", ())
    excluded = why_not_frame_parallel(circuit)
    names = [name for name in CANDIDATES if name != "frame-parallel" or excluded is None]
    trials = tuple(measure(name, item, try_run, seconds / len(names)) for name in names)
    best, why = pick(trials, frame_rate)
    note = "" if excluded is None else f"; frame-parallel left out: {excluded}"
    return Choice(best.executor, f"{why}{note}", trials)


def pick(trials: tuple[Trial, ...], frame_rate: float | None) -> tuple[Trial, str]:
    """The best trial and the reason, from plain numbers."""
    measured = ", ".join(
        f"{t.name} {t.frames_per_second:.1f} frames/s at {t.latency_seconds * 1e3:.0f} ms" for t in trials
    )
    keeping_up = [t for t in trials if frame_rate is not None and t.frames_per_second >= 1.05 * frame_rate]
    if keeping_up:
        best = min(keeping_up, key=lambda t: t.latency_seconds)
        return best, f"lowest latency among those that keep up with {frame_rate:g} frames/s ({measured})"
    best = max(trials, key=lambda t: t.frames_per_second)
    goal = "highest throughput" if frame_rate is None else f"none keeps up with {frame_rate:g} frames/s; fastest"
    return best, f"{goal} ({measured})"


def measure(executor: str, item: Any, try_run: Callable[[str, Iterator[Any]], Iterator[Any]], seconds: float) -> Trial:
    """Run ``executor`` on the same item over and over: warm up for a quarter of the time, then count for the rest."""
    outputs = try_run(executor, itertools.repeat(item))
    _until(outputs, time.perf_counter() + 0.25 * seconds, at_least=2)
    started = time.perf_counter()
    count, latencies = _until(outputs, started + 0.75 * seconds, at_least=2)
    elapsed = time.perf_counter() - started
    if hasattr(outputs, "close"):
        outputs.close()
    return Trial(executor, count / elapsed, median(latencies))


def _until(outputs: Iterator[Any], deadline_seconds: float, *, at_least: int) -> tuple[int, list[float]]:
    latencies: list[float] = []
    while len(latencies) < at_least or time.perf_counter() < deadline_seconds:
        latencies.append(next(outputs).latency_seconds)
    return len(latencies), latencies
