"""Cut a model for a back end: balance its stages by what they cost there, not by what they cost in eager.

A convolution gains more from a runtime than a norm that the runtime folds away, so stages that are even in eager
are not even elsewhere. Each round compiles the stages, times them, scales the eager costs of each stage's nodes to
the time that the stage really took, and cuts again:

    stage            1          2                    the boundary moves into stage 2 until both take 3.0 ms
    eager, ms     7.8          8.9     (even)
    runtime, ms   2.4          3.7     (not even)
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sidestream.circuit.cut import cut
from sidestream.circuit.measure import one_thread
from sidestream.circuit.stage import NOTHING, Stage, Stages, State, Values
from sidestream.engine.backends.registry import compile_stages
from sidestream.engine.backends.tensors import Level
from sidestream.report.measure import num_cores

EVEN = 1.05
"""The dearest stage may take this many times an even share before another round is worth its conversions."""


def cut_for_backend(
    model: nn.Module,
    example: Any,
    backend: str,
    *,
    num_stages: int | str = "auto",
    rounds: int = 2,
    num_workers: int | None = None,
    check: Level = "full",
    options: Mapping[str, Any] | None = None,
    **cut_options: Any,
) -> Stages:
    """``model`` cut into ``num_stages`` stages that run on ``backend`` and are balanced there.

    ``rounds``: how often at most to cut again; each converts all stages anew. The best cut found is kept.
    ``num_workers``: threads that will run the stages (default: the machine's processors). With more stages than
    workers a stage may be dearer than the others, as long as it is not dearer than a worker's share.
    ``check``: as in ``compile_stages``, for all of these conversions.
    ``options``: more for ``compile_stages``; ``cut_options``: for ``cut`` (``name``, ``input_spec`` ...).
    Eager stages and single stages are cut once. Raises what ``cut`` and ``compile_stages`` raise.
    """
    workers = num_workers or num_cores()
    stages = cut(model, example, num_stages=num_stages, num_workers=workers, **cut_options)
    options = {"check": check, **(options or {})}
    best = compile_stages(stages, backend, **options)
    if backend == "eager" or len(stages) == 1 or any(s.unit_costs is None or s.hides_state for s in stages):
        return best
    best = latest = timed(best)
    units = [cost for stage in stages for cost in stage.unit_costs or ()]
    for _ in range(rounds):
        if tick_seconds(latest, workers) <= EVEN * total_seconds(latest) / min(workers, len(latest)):
            break
        costs = rescaled(units, [len(stage.unit_costs or ()) for stage in stages], _seconds(latest))
        stages = cut(model, example, num_stages=len(stages), costs=costs, **cut_options)
        latest = timed(compile_stages(stages, backend, **options))
        best = min(best, latest, key=lambda found: (tick_seconds(found, workers), total_seconds(found)))
    return best


def rescaled(costs: Sequence[float], counts: Sequence[int], seconds: Sequence[float]) -> list[float]:
    """Costs of nodes, scaled so that those of each stage (``counts`` of them) add up to its ``seconds``."""
    scaled: list[float] = []
    start = 0
    for count, wanted in zip(counts, seconds, strict=True):
        part = costs[start : start + count]
        total = sum(part)
        scaled += [cost * wanted / total if total > 0 else wanted / count for cost in part]
        start += count
    return scaled


def timed(stages: Stages, *, num_runs: int = 15, budget_seconds: float = 1.0) -> Stages:
    """``stages`` with the measured cost of each: seconds of a tick, the mean over a period of the fastest warm one.

    The stages run in a row on the example, frame after frame, so they take turns, and the fastest counts: what else the
    machine does then tips no balance.
    """
    assert stages.example is not None
    period = max(stage.period_ticks for stage in stages)
    rows = [_Timed(stage) for stage in stages]
    watched = stages.with_stages(tuple(row.stage for row in rows))
    args, kwargs = stages.example
    state, rounds = watched.init_state(), 0
    stop_at = time.perf_counter() + budget_seconds
    with torch.inference_mode(), one_thread():
        while rounds < 3 or (rounds < num_runs and time.perf_counter() < stop_at):
            for _ in range(period):
                state = watched.step(state, *args, **kwargs)[1]
            rounds += 1
            for row in rows:
                row.next_round()
    return stages.with_stages(
        tuple(
            replace(stage, cost_seconds=min(row.rounds[1:]) / period) for stage, row in zip(stages, rows, strict=True)
        )
    )


class _Timed:
    """A stage that notes how long it works."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self._step = replace(stage, step=self._noted), stage.step
        self.rounds: list[float] = []
        self._seconds = 0.0

    def _noted(self, inputs: Values, state: State) -> tuple[Values, State]:
        start = time.perf_counter()
        is_idle = any(value is NOTHING for value in inputs)
        made = ((NOTHING,) * self.stage.num_outputs, state) if is_idle else self._step(inputs, state)
        self._seconds += time.perf_counter() - start
        return made

    def next_round(self) -> None:
        self.rounds.append(self._seconds)
        self._seconds = 0.0


def total_seconds(stages: Stages) -> float:
    """Work of one frame on one thread."""
    return sum(_seconds(stages))


def tick_seconds(stages: Stages, num_workers: int) -> float:
    """The least time between two answers: a stage does one frame at a time, and a worker one stage."""
    return max(*_seconds(stages), total_seconds(stages) / num_workers)


def _seconds(stages: Stages) -> list[float]:
    return [stage.cost_seconds or 0.0 for stage in stages]
