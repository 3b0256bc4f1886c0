"""Is a converted stage what eager is? Asked on several inputs in a row, not on the example alone.

    the example                       then other values (``probes.py``): noise, scaled by 30, negated, zeros, ...
    the example in other layouts      a frame may come in channels-last memory, or as a view
    the example again                 the same answer, and the first one has not been written to

An input on which eager itself fails is skipped. NaN must meet NaN and infinity the same infinity; everything else may
differ by ``ROUNDING`` of the largest value, or, where eager's own answer moves when its operations are rounded
otherwise (``rounding.py``), by 50 times as much as that. Where eager's own whole numbers flip so, they prove nothing.

Cost: at most 12 runs of eager and 16 of the runtime beside the example's, and fewer as soon as a second (of this
thread's processor time) has passed beyond the first four. What differs costs four more runs of eager each time.
What no such input shows is written down in the documentation (exactness), or refused by name (``operators.py``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sidestream.circuit.stage import Stage, Values
from sidestream.engine.backends.probes import layouts, probes
from sidestream.engine.backends.rounding import deviations, distance, largest_of
from sidestream.engine.backends.tensors import BackendOptions, Level, Plan, Runtime, cannot, converted, described, same

ROUNDING = {"float32": 1e-3, "bfloat16": 1e-1}
"""How far a converted stage may be from eager, relative to the largest value of that output: wrong, not rounded."""
CONDITIONING = 50
"""How many times as far as eager is from itself, rounded otherwise."""
OF_USUAL = 1e-2
"""An output that nearly vanishes is judged as if it were this part of what it is on the example."""
LEAST = 1e-6
NUM_SURE = 4
"""Inputs that are always tried."""
BUDGET_SECONDS = 1.0
"""Time for the others: this thread's processor time, so that a busy machine tries no fewer."""
NUM_PROBES = 12
"""Inputs with other values than the example's, at most."""


def check(plan: Plan, backend: str, runtime: Runtime, precision: str = "float32", level: Level = "full") -> None:
    """Raise BackendError unless ``runtime`` answers as eager does. ``level``: "full", "once" (the example) or "off"."""
    if level == "off":
        return
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        judge = Judge(plan, backend, runtime, precision)
        first = judge.try_example()
        if level == "full":
            kept = [answer.clone() for answer in first]
            judge.try_others()
            judge.try_again(first, kept)


class Judge:
    """Compares a runtime with eager, input by input."""

    def __init__(self, plan: Plan, backend: str, runtime: Runtime, precision: str) -> None:
        self._plan, self._backend, self._runtime, self._precision = plan, backend, runtime, precision
        self._usual = [float(largest_of(v)) if _is_floats(v) else 0.0 for v in plan.answered]

    def try_example(self) -> Sequence[Tensor]:
        """Compare on the example; the runtime's answers."""
        return self._compare("its example", self._plan.example, self._plan.answered)

    def try_others(self) -> None:
        """Compare on other values, and on the example in other layouts, as far as time allows."""
        stop_at: float | None = None
        for n, (kind, inputs) in enumerate(probes(self._plan.example)):
            if n == NUM_SURE - 1:
                stop_at = time.thread_time() + BUDGET_SECONDS
            if n == NUM_PROBES or (stop_at is not None and time.thread_time() > stop_at):
                break
            expected = self._eager(inputs)
            if expected is not None:
                self._compare(kind, inputs, expected)
        for kind, inputs in layouts(self._plan.example):
            self._compare(kind, inputs, self._plan.answered)

    def try_again(self, first: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
        """Compare on the example once more; ``first`` were the answers, ``kept`` are copies of them made then."""
        again = self._compare("its example given again", self._plan.example, self._plan.answered)
        for n, (answer, copy, other) in enumerate(zip(first, kept, again, strict=True)):
            if bool((distance(answer, copy) > 0).any()) or _same_memory(answer, other):
                raise self._refused(f"the memory of answer {n} of its runtime is used again by a later run")

    def _eager(self, inputs: Values) -> Values | None:
        """What eager answers, or None where it cannot."""
        try:
            return self._plan.step(_copies(inputs), None)[0]
        except Exception:
            return None

    def _compare(self, kind: str, inputs: Values, expected: Values) -> Sequence[Tensor]:
        answers = self._runtime([inputs[i] for i in self._plan.fed])
        outputs = self._plan.outputs(inputs, answers)
        wrong = {n: why for n, why in enumerate(map(self._wrong, outputs, expected, self._usual)) if why is not None}
        if wrong:
            self._judge(kind, inputs, expected, outputs, wrong)
        return answers

    def _wrong(self, answer: Any, expected: Any, usual: float) -> str | None:
        """What is wrong with an answer if rounding is as small as usual, or None."""
        if not isinstance(expected, Tensor) or not isinstance(answer, Tensor):
            return None if same(answer, expected) else f"is {described(answer)} where eager gives {described(expected)}"
        if answer.shape != expected.shape or answer.dtype != expected.dtype:
            return f"is {described(answer)} where eager gives {described(expected)}"
        if answer is expected or expected.numel() == 0:
            return None
        apart = distance(answer, expected)
        return _told(apart, expected) if float(apart.max()) > self._tolerance(expected, usual) else None

    def _judge(self, kind: str, inputs: Values, expected: Values, outputs: Values, wrong: dict[int, str]) -> None:
        """Raise BackendError for the first output whose error is more than eager's own rounding can make."""
        moved = self._deviations(inputs, expected)
        for n, why in wrong.items():
            move = moved[n]
            if move is None or move.shape != outputs[n].shape or outputs[n].dtype != expected[n].dtype:
                raise self._refused(f"its output {n} {why} on inputs: {kind}")
            apart, tolerance = distance(outputs[n], expected[n]), self._tolerance(expected[n], self._usual[n])
            if not excused(apart, move, tolerance):
                raise self._refused(f"its output {n} {why} on inputs: {kind}")

    def _deviations(self, inputs: Values, expected: Values) -> list[Tensor | None]:
        def run(given: Values) -> Values:
            return self._plan.step(given, None)[0]

        try:
            return deviations(run, inputs, self._precision, expected)
        except Exception:  # eager refuses what is a little off: then it is judged without
            return [torch.zeros(v.shape) if isinstance(v, Tensor) else None for v in expected]

    def _tolerance(self, expected: Tensor, usual: float) -> float:
        if not _is_floats(expected):
            return 0.0
        return ROUNDING[self._precision] * max(float(largest_of(expected)), OF_USUAL * usual, LEAST)

    def _refused(self, reason: str) -> Exception:
        return cannot(self._plan.name, self._backend, reason)


def excused(apart: Tensor, moved: Tensor, tolerance: float) -> bool:
    """Whether errors ``apart`` are no more than what rounding moves eager by, ``moved``, element by element.

    A few draws do not move every element that could move: as many more may be wrong as did move, and no further.
    """
    could = moved * CONDITIONING
    wrong = apart > could.clamp_min(tolerance)
    if not bool(wrong.any()):
        return True
    return bool(wrong.sum() <= (could > tolerance).sum()) and float(apart[wrong].max()) <= float(could.max())


def handed_through(stage: Stage, plan: Plan, backend: str, options: BackendOptions) -> Stage:
    """A stage that makes no tensor: its outputs are its inputs and numbers. Nothing is left to convert."""
    check(plan, backend, lambda tensors: (), level=options.check)
    return converted(stage, plan, backend, lambda tensors: ())


def owned(plan: Plan, runtime: Runtime) -> Runtime:
    """``runtime`` with copies of those answers whose memory is not the caller's: constants, and views of inputs."""
    tensors = plan.tensors
    packed = [tensor.contiguous() for tensor in tensors]
    first, second = runtime(tensors), runtime(packed)
    taken = {_address(tensor) for tensor in (*tensors, *packed)}
    shared = {
        n for n, (a, b) in enumerate(zip(first, second)) if {_address(a), _address(b)} & taken or _same_memory(a, b)
    }
    if not shared:
        return runtime
    return lambda given: [a.clone() if n in shared else a for n, a in enumerate(runtime(given))]


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.numel() > 0 and _address(one) == _address(other)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _told(apart: Tensor, expected: Tensor) -> str:
    """The size of a difference, in words."""
    largest = float(apart.max())
    if largest == float("inf"):
        count = f"{int(apart.isinf().sum())} of {apart.numel()} values"
        wrong = "is NaN or infinite elsewhere than eager's, in" if _is_floats(expected) else "is not eager's in"
        return f"{wrong} {count}"
    return f"differs from eager by {largest / max(float(largest_of(expected)), 1e-30):.1e} of the largest"


def _is_floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0


def _copies(inputs: Values) -> Values:
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)
