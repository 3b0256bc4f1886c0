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

from torch import fx, nn

from sidestream.circuit.cut import cut
from sidestream.circuit.measure import weigh
from sidestream.circuit.stage import Stage, Stages
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
    Eager stages, single stages and stages with state are cut once. Raises what ``cut`` and ``compile_stages`` raise.
    """
    workers = num_workers or num_cores()
    stages = cut(model, example, num_stages=num_stages, num_workers=workers, **cut_options)
    options = {"check": check, **(options or {})}
    best = compile_stages(stages, backend, **options)
    if backend == "eager" or len(stages) == 1 or not all(_is_graph(stage) for stage in stages):
        return best
    best, eager_costs = timed(best), [cost for stage in stages for cost in _node_costs(stage)]
    latest = best
    for _ in range(rounds):
        if tick_seconds(latest, workers) <= EVEN * total_seconds(latest) / min(workers, len(latest)):
            break
        costs = rescaled(eager_costs, [_num_nodes(stage) for stage in stages], _seconds(latest))
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
    """``stages`` with the measured cost of each: the fastest of its warm runs on its example.

    The stages take turns, and the fastest run counts: what else the machine does then tips no balance.
    """
    seconds: list[list[float]] = [[] for _ in stages]
    stop_at = time.perf_counter() + budget_seconds
    while len(seconds[0]) < 3 or (len(seconds[0]) < num_runs and time.perf_counter() < stop_at):
        for stage, runs in zip(stages, seconds, strict=True):
            runs.append(_seconds_of_a_run(stage))
    return stages.with_stages(
        tuple(replace(stage, cost_seconds=min(runs[1:])) for stage, runs in zip(stages, seconds, strict=True))
    )


def total_seconds(stages: Stages) -> float:
    """Work of one frame on one thread."""
    return sum(_seconds(stages))


def tick_seconds(stages: Stages, num_workers: int) -> float:
    """The least time between two answers: a stage does one frame at a time, and a worker one stage."""
    return max(*_seconds(stages), total_seconds(stages) / num_workers)


def _seconds_of_a_run(stage: Stage) -> float:
    assert stage.example_inputs is not None
    start = time.perf_counter()
    stage.step(stage.example_inputs, None)
    return time.perf_counter() - start


def _seconds(stages: Stages) -> list[float]:
    return [stage.cost_seconds or 0.0 for stage in stages]


def _is_graph(stage: Stage) -> bool:
    return not stage.is_stateful and isinstance(stage.module, fx.GraphModule) and stage.example_inputs is not None


def _node_costs(stage: Stage) -> list[float]:
    return weigh(stage.module, list(stage.example_inputs or ()), "measured")


def _num_nodes(stage: Stage) -> int:
    return sum(node.op in ("call_function", "call_module", "call_method") for node in stage.module.graph.nodes)
