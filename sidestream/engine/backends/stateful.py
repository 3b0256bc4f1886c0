"""Stages with a state on a foreign runtime: the tensors of the state are inputs and outputs of the converted program.

    eager      step(inputs, state) -> (outputs, state)
    program    (inputs, tensors of the state) -> (outputs, tensors of the next state)

A state is tensors and fixed things (counters, None, how many frames wait). While only the tensors change, the program
is the same; where the fixed things or the shapes change from tick to tick (a layer with a temporal stride counts),
there is one program for each kind of tick. Which kinds there are is found by running the stages in eager, frame after
frame, until they come again; the ticks before that (a window that fills up) and what is owed at the end run in eager.
The state stays the same value as in eager, so it can be read, kept and handed from one back end to another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sidestream.circuit.group import RowStep
from sidestream.circuit.segment import PieceStep, shapes_of
from sidestream.circuit.slice import ChainStep
from sidestream.circuit.stage import NOTHING, SOURCE, Stage, Stages, State, Values
from sidestream.circuit.verify import perturbed
from sidestream.engine.backends.tensors import BackendOptions
from sidestream.errors import BackendError

MOST_TICKS = 256
"""Beside twice the period: until a state has settled."""
MOST_SECONDS = 120.0
MOST_PERIODS = 16
"""A state may count by itself, beyond the strides: so many periods long."""

Kind = tuple[Any, ...]
"""What is fixed in a tick: ``shapes_of`` inputs and state."""


@dataclass(frozen=True, eq=False)
class Ticks:
    """One part of a stage, and each kind of tick in which it works for ever, with the inputs and the state of one."""

    part: Stage
    kinds: dict[Kind, tuple[Values, State]]


@dataclass(frozen=True, eq=False)
class ProgramStep:
    """``step`` of a part: the program of the tick's kind, or eager where there is none."""

    programs: dict[Kind, Callable[[Values, State], tuple[Values, State]]]
    eager: Callable[[Values, State], tuple[Values, State]]
    num_outputs: int

    def __call__(self, inputs: Values, state: State) -> tuple[Values, State]:
        if any(value is NOTHING for value in inputs):
            return (NOTHING,) * self.num_outputs, state
        program = self.programs.get(kind_of(inputs, state))
        if program is None:
            return self.eager(inputs, state)
        return program(inputs, state)


class FlatStep(nn.Module):
    """A step on flat values: ``forward(inputs, leaves of the state)`` gives outputs and the next leaves."""

    def __init__(self, part: Stage, spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.training = False  # of this wrapper only
        self.module = part.module
        self._part, self._spec = part, spec

    def forward(self, *values: Any) -> tuple[Any, ...]:
        count = self._part.num_inputs
        state = pytree.tree_unflatten(list(values[count:]), self._spec)
        step = self._part.step
        step = step.on_module(self.module) if isinstance(step, PieceStep) else step
        outputs, after = getattr(step, "with_gradients", step)(values[:count], state)
        return (*outputs, *pytree.tree_leaves(after))


def kind_of(inputs: Values, state: State) -> Kind:
    """What is fixed in a tick."""
    return (*map(_shape, inputs), shapes_of(state))


def _shape(value: Any) -> Any:
    return (value.shape, value.dtype) if isinstance(value, Tensor) else value


def programmed(
    stage: Stage,
    ticks: Sequence[Ticks],
    compile_stage: Callable[[Stage, BackendOptions], Stage],
    options: BackendOptions,
    backend: str,
) -> Stage:
    """The stage with every part on ``backend``. Raises BackendError."""
    parts = [_part_on(each, compile_stage, options, backend) for each in ticks]
    if isinstance(stage.step, RowStep):
        row = replace(stage.step, parts=tuple(parts))
        return replace(stage, step=row, guard=row.guard, backend=backend)
    return replace(parts[0], backend=backend)


def _part_on(
    ticks: Ticks, compile_stage: Callable[[Stage, BackendOptions], Stage], options: BackendOptions, backend: str
) -> Stage:
    part = ticks.part
    if not part.is_stateful and not isinstance(part.step, ChainStep):
        converted = compile_stage(part, options)
        return replace(converted, step=ProgramStep({}, converted.step, part.num_outputs))
    programs, guards = {}, []
    for kind, (inputs, state) in ticks.kinds.items():
        program = compile_stage(_flat(part, inputs, state), options)
        after_spec = _spec_after(part, inputs, state)
        programs[kind] = _unflattened(program.step, part.num_outputs, after_spec)
        guards.append(program.guard)

    def guard() -> None:
        for each in guards:
            if each is not None:
                each()

    step = ProgramStep(programs, part.step, part.num_outputs)
    return replace(part, step=step, guard=guard, backend=backend, copy=None)


def _flat(part: Stage, inputs: Values, state: State) -> Stage:
    """The step in ticks of one kind as a stage without state."""
    leaves, spec = pytree.tree_flatten(state)
    module = FlatStep(part, spec)

    def step(values: Values, nothing: State) -> tuple[Values, State]:
        state = pytree.tree_unflatten(list(values[part.num_inputs :]), spec)
        outputs, after = part.step(values[: part.num_inputs], state)
        return (*outputs, *pytree.tree_leaves(after)), None

    num_after = len(pytree.tree_leaves(part.step(inputs, state)[1]))
    return Stage(
        name=part.name,
        step=step,
        num_inputs=part.num_inputs + len(leaves),
        num_outputs=part.num_outputs + num_after,
        module=module,
        example_inputs=(*inputs, *leaves),
        guard=part.guard,
    )


def _spec_after(part: Stage, inputs: Values, state: State) -> pytree.TreeSpec:
    return pytree.tree_structure(part.step(inputs, state)[1])


def _unflattened(step: Any, num_outputs: int, spec: pytree.TreeSpec) -> Callable[[Values, State], tuple[Values, State]]:
    def run(inputs: Values, state: State) -> tuple[Values, State]:
        values, _ = step((*inputs, *pytree.tree_leaves(state)), None)
        return values[:num_outputs], pytree.tree_unflatten(list(values[num_outputs:]), spec)

    return run


def ticks_of(stages: Stages, backend: str) -> list[list[Ticks]]:
    """For each stage and part: the kinds of its ticks, once the stream is under way. Runs the stages in eager."""
    assert stages.example is not None
    period = math.lcm(*(stage.period_ticks for stage in stages))
    seen: list[list[dict[Kind, tuple[Values, State]]]] = []  # per tick, part by part
    rows = [_Watched(stage) for stage in stages]
    state = [row.stage.begin() for row in rows]
    watched = stages.with_stages(tuple(row.stage for row in rows))
    started, cycle = time.perf_counter(), None
    with torch.inference_mode():
        while cycle is None:
            args, kwargs = perturbed(stages.example, seed=len(seen))
            values: dict[tuple[int, int], Any] = {
                (SOURCE, n): leaf for n, leaf in enumerate(pytree.tree_leaves((args, kwargs)))
            }
            for number, stage in enumerate(watched, start=1):
                inputs = stages.inputs_of(values, number)
                if any(value is NOTHING for value in inputs):
                    outputs: Values = (NOTHING,) * stage.num_outputs
                else:
                    outputs, state[number - 1] = stage.step(inputs, state[number - 1])
                values |= {(number, n): value for n, value in enumerate(outputs)}
            seen.append([kinds for row in rows for kinds in row.taken()])
            cycle = _cycle(seen, period)
            if cycle is None and (len(seen) > MOST_TICKS + 2 * period or time.perf_counter() - started > MOST_SECONDS):
                raise BackendError(
                    f"the back end {backend!r} cannot run {stages.name!r}: after {len(seen)} frames its state still "
                    "changes its shapes (it grows with the stream); use the back end 'eager'"
                )
    flat: list[dict[Kind, tuple[Values, State]]] = [{} for _ in seen[-1]]
    for tick in seen[-cycle:]:
        for kinds, now in zip(flat, tick):
            kinds |= now
    found = iter(flat)
    return [[Ticks(part, next(found)) for part in row.parts] for row in rows]


def _cycle(seen: Sequence[Sequence[dict[Kind, Any]]], period: int) -> int | None:
    """The number of ticks after which all kinds came again, in the latest two rounds; None: not yet."""
    for length in range(period, period * MOST_PERIODS + 1, period):
        rounds = [[[kinds.keys() for kinds in tick] for tick in seen[-n * length :]][:length] for n in (1, 2)]
        if len(seen) >= 2 * length and rounds[0] == rounds[1]:
            return length
    return None


class _Watched:
    """A stage whose parts note the kind of every tick."""

    def __init__(self, stage: Stage) -> None:
        self.parts = stage.step.parts if isinstance(stage.step, RowStep) else (stage,)
        self._kinds: list[dict[Kind, tuple[Values, State]]] = [{} for _ in self.parts]
        noted = [self._noted(n, part) for n, part in enumerate(self.parts)]
        if isinstance(stage.step, RowStep):
            self.stage = replace(stage, step=replace(stage.step, parts=tuple(noted)))
        else:
            self.stage = noted[0]

    def _noted(self, n: int, part: Stage) -> Stage:
        def step(inputs: Values, state: State) -> tuple[Values, State]:
            self._kinds[n][kind_of(inputs, state)] = (inputs, state)
            return part.step(inputs, state)

        return replace(part, step=step)

    def taken(self) -> list[dict[Kind, tuple[Values, State]]]:
        taken, self._kinds = self._kinds, [{} for _ in self.parts]
        return taken


def needs_ticks(stage: Stage) -> bool:
    """Whether what a stage is given changes from tick to tick: it has a state, or layers that swallow frames."""
    return not stage.hides_state and (stage.is_stateful or isinstance(stage.step, ChainStep | PieceStep | RowStep))
