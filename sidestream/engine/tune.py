"""``tune``: tries back ends, numbers of stages and executors on the real model and input, and keeps the fastest.

The candidates, per back end: the whole model in one stage (sequential; frame-parallel where that is possible), and
the model in stages (pipelined on threads). A cut that helps a model with memory is of no use to one without on a
machine with few cores, and a back end that is fast on one model is slow on another: so it is measured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from sidestream.circuit.cut import cut
from sidestream.circuit.stage import Stages
from sidestream.circuit.wire import Circuit
from sidestream.circuit.wiring import pipelined
from sidestream.engine.auto import Trial, measure, pick
from sidestream.engine.backends import available_backends, compile_stages
from sidestream.engine.run import Run, num_cores, run
from sidestream.errors import InputError

log = logging.getLogger("sidestream.engine")
FAST_TO_BUILD = ("eager", "onnxruntime", "openvino")
"""What ``backends="auto"`` tries; inductor takes minutes to compile and is tried only when named."""


@dataclass(frozen=True)
class Tuned:
    """The fastest way found to run a model: ``run(tuned.circuit, frames, executor=tuned.executor)``."""

    circuit: Circuit
    executor: str
    backend: str
    reason: str
    trials: tuple[Trial, ...]


def tune(
    model: nn.Module,
    example: Any,
    *,
    num_stages: int | str = "auto",
    backends: Sequence[str] | str = "auto",
    frame_rate: float | None = None,
    seconds: float = 1.0,
    on_progress: Callable[[str], None] | None = None,
) -> Tuned:
    """Measure each candidate for a share of ``seconds`` per back end and number of stages, and pick.

    ``frame_rate``: of a live source; candidates that keep up with it are ranked by latency, else by throughput.
    ``backends``: names, or "auto" for eager and, where installed, ONNX Runtime and OpenVINO.
    """
    names = _backend_names(backends)
    found: list[tuple[Trial, Circuit, str]] = []
    cuts = _cuts(model, example, num_stages)
    for stages in cuts:
        for backend in names:
            if on_progress:
                on_progress(f"{backend}, {len(stages)} stages")
            found += _try(stages, backend, example, seconds, _executors(stages, is_only=len(cuts) == 1))
    best, reason = pick(tuple(t for t, _, _ in found), frame_rate)
    _, circuit, backend = next(f for f in found if f[0] is best)
    return Tuned(circuit, best.executor.rsplit(maxsplit=1)[-1], backend, reason, tuple(t for t, _, _ in found))


def _cuts(model: nn.Module, example: Any, num_stages: int | str) -> list[Stages]:
    """The model whole and in stages; with a given number of stages only so."""
    whole = [cut(model, example, num_stages=1)] if num_stages == "auto" else []
    staged = cut(model, example, num_stages=num_stages)
    return [*whole, staged] if len(staged) > 1 or not whole else whole


def _backend_names(backends: Sequence[str] | str) -> list[str]:
    if isinstance(backends, str):
        usable = [name for name, why_not in available_backends().items() if why_not is None]
        return [n for n in FAST_TO_BUILD if n in usable] if backends == "auto" else [backends]
    if not backends:
        raise InputError("backends is empty; name at least one, or 'auto'")
    return list(backends)


def _try(
    stages: Stages, backend: str, example: Any, seconds: float, executors: Sequence[tuple[str, int]]
) -> list[tuple[Trial, Circuit, str]]:
    """Trials of one back end on one cut; a back end that cannot run the model is left out, with a log line."""
    item = example if isinstance(example, tuple | dict) else (example,)
    found = []
    for executor, num_threads in executors:
        try:
            circuit = pipelined(compile_stages(stages, backend, num_threads=num_threads))
        except InputError as error:
            if backend == "eager":
                raise
            log.warning("%s is left out: %s", backend, error)
            return []
        trial = measure(executor, item, partial(_run, circuit), seconds)
        label = f"{backend} in {len(stages)} stage{'s' * (len(stages) > 1)}, {executor}"
        found.append((replace(trial, executor=label), circuit, backend))
    return found


def _executors(stages: Stages, *, is_only: bool) -> list[tuple[str, int]]:
    """Which executors make sense for a cut, each with the threads that a stage may use inside."""
    if num_cores() == 1:
        return [("sequential", 1)]
    whole = [("sequential", num_cores())] + ([] if stages.is_stateful else [("frame-parallel", 1)])
    staged = [("threads", 1)] if len(stages) > 1 else []
    return whole + staged if is_only or not staged else staged


def _run(circuit: Circuit, executor: str, items: Iterator[Any]) -> Run:
    return run(circuit, items, executor=executor)
