"""``tune``: tries back ends, numbers of stages and executors on the real model and input, and keeps the fastest.

The candidates, per back end: the whole model in one stage (sequential; frame-parallel where that is possible), and
the model in stages (pipelined on threads). A cut that helps a model with memory is of no use to one without on a
machine with few cores, and a back end that is fast on one model is slow on another: so it is measured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from sidestream.circuit.cut import cut
from sidestream.circuit.stage import Stages
from sidestream.circuit.wire import Circuit
from sidestream.circuit.wiring import pipelined
from sidestream.engine.auto import Trial, measure, pick
from sidestream.engine.backends import available_backends, compile_stages, cut_for_backend, require_backend
from sidestream.engine.choices import Kept, keep, key_of, load
from sidestream.engine.run import Run, run
from sidestream.errors import InputError
from sidestream.report.measure import num_cores

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
    is_kept: bool = False
    """It was found at an earlier start, and not measured again."""


def tune(
    model: nn.Module,
    example: Any,
    *,
    num_stages: int | str = "auto",
    backends: Sequence[str] | str = "auto",
    num_threads: int | None = None,
    frame_rate: float | None = None,
    seconds: float = 1.0,
    remembers: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> Tuned:
    """Measure each candidate for ``seconds`` (four answers, if ``auto.LIMIT_SECONDS`` allow) and pick.

    ``backends``: names, or "auto" for eager and, where installed, ONNX Runtime and OpenVINO. With "auto" a back end
    that cannot run the model is left out, with a log line; one that was named raises.
    ``num_threads``: workers, or threads inside of a whole model; default: all cores.
    ``frame_rate``: of a live source; candidates that keep up with it are ranked by latency, else by throughput.
    ``remembers``: keep the choice for this model, input, machine and versions (``engine/choices.py``), and take one
    that was kept instead of measuring.
    """
    wish = {"stages": num_stages, "backends": backends, "threads": num_threads, "frame_rate": frame_rate}
    key = key_of(model, example, wish) if remembers else None
    if key is not None and (kept := load(key)) is not None:
        try:
            return _rebuilt(model, example, kept, num_threads or num_cores())
        except InputError as error:
            log.warning("a kept choice does not fit the model any more, and is measured anew: %s", error)
    search = _Search(model, example, num_threads or num_cores(), seconds)
    names = _backend_names(backends)
    say = on_progress or (lambda text: None)
    say("measuring what the layers cost, to cut the model into stages")
    cuts = _cuts(model, example, num_stages, search.num_threads)
    if any(stage.draws for stage in cuts[-1]):
        why = "the model draws random numbers, whose order is the model's in sequence only"
        return Tuned(pipelined(cuts[-1]), "sequential", "eager", why, ())
    if any(stage.hides_state and stage.init_buffers is None for stage in cuts[-1]):
        why = "the model keeps state in its buffers, which trials would change"
        return Tuned(pipelined(cuts[-1]), "threads", "eager", why, ())
    if any(stage.hides_state for stage in cuts[-1]):
        names = ["eager"]  # no other back end runs them
    for stages in cuts:
        for name in names:
            search.try_backend(stages, name, is_only_cut=len(cuts) == 1, may_fail=backends == "auto", say=say)
    best, reason = pick(tuple(f.trial for f in search.found), frame_rate)
    found = next(f for f in search.found if f.trial is best)
    trials, parts = tuple(f.trial for f in search.found), found.circuit.stages
    if key is not None and all(part.unit_costs is not None for part in parts):
        costs = tuple(cost for part in parts for cost in part.unit_costs or ())
        keep(key, Kept(found.backend, best.executor, len(parts), costs, reason, trials))
    return Tuned(found.circuit, best.executor, found.backend, reason, trials)


def _rebuilt(model: nn.Module, example: Any, kept: Kept, num_threads: int) -> Tuned:
    """A choice that was kept, made again: cut at the same places, converted, not measured."""
    stages = cut(model, example, num_stages=kept.num_stages, costs=list(kept.unit_costs))
    num_inside = num_threads if kept.executor == "sequential" else 1
    circuit = pipelined(compile_stages(stages, kept.backend, num_threads=num_inside))
    return Tuned(circuit, kept.executor, kept.backend, kept.reason, kept.trials, is_kept=True)


@dataclass(frozen=True)
class _Found:
    trial: Trial
    circuit: Circuit
    backend: str


@dataclass
class _Search:
    """The trials so far."""

    model: nn.Module
    example: Any
    num_threads: int
    seconds: float
    found: list[_Found] = field(default_factory=list)

    def try_backend(
        self, stages: Stages, backend: str, *, is_only_cut: bool, may_fail: bool, say: Callable[[str], None]
    ) -> None:
        """Trials of one back end on one cut."""
        try:
            for executor in self._executors(stages, is_only_cut=is_only_cut):
                setting = f"{backend} in {len(stages)} stage{'s' * (len(stages) > 1)}"
                say(f"{setting}, {executor}: measuring")
                circuit = pipelined(self._compiled(stages, backend, executor))
                item = self.example if isinstance(self.example, tuple | dict) else (self.example,)
                trial = measure(
                    executor,
                    item,
                    partial(self._run, circuit),
                    self.seconds,
                    period_ticks=max(s.period_ticks for s in stages),
                )
                self.found.append(_Found(replace(trial, setting=setting), circuit, backend))
        except InputError as error:
            if backend == "eager" or not may_fail:
                raise
            log.warning("%s is left out: %s", backend, error)

    def _compiled(self, stages: Stages, backend: str, executor: str) -> Stages:
        """Stages on ``backend``: whole models with threads inside, those that run side by side with one thread each,
        and rows of stages balanced by what they cost there."""
        if executor == "threads" and backend != "eager":
            return cut_for_backend(
                self.model,
                self.example,
                backend,
                num_stages=len(stages),
                num_workers=self.num_threads,
                name=stages.name,
                input_spec=stages.input_spec,
            )
        return compile_stages(stages, backend, num_threads=self.num_threads if executor == "sequential" else 1)

    def _executors(self, stages: Stages, *, is_only_cut: bool) -> list[str]:
        """Which executors make sense for a cut."""
        if self.num_threads == 1:
            return ["sequential"]
        whole = ["sequential"] if stages.is_stateful else ["sequential", "frame-parallel"]
        staged = ["threads"] if len(stages) > 1 else []
        return whole + staged if is_only_cut or not staged else staged

    def _run(self, circuit: Circuit, executor: str, items: Iterator[Any]) -> Run:
        return run(circuit, items, executor=executor, num_threads=self.num_threads)


def _cuts(model: nn.Module, example: Any, num_stages: int | str, num_workers: int) -> list[Stages]:
    """The model whole and in stages; with a given number of stages only so."""
    whole = [cut(model, example, num_stages=1)] if num_stages == "auto" else []
    staged = cut(model, example, num_stages=num_stages, num_workers=num_workers)
    return [*whole, staged] if len(staged) > 1 or not whole else whole


def _backend_names(backends: Sequence[str] | str) -> list[str]:
    usable = available_backends()
    if backends == "auto":
        return [name for name in FAST_TO_BUILD if usable.get(name) is None]
    names = [backends] if isinstance(backends, str) else list(backends)
    if not names:
        raise InputError("backends is empty; name at least one, or 'auto'")
    for name in names:
        require_backend(name)
    return names
