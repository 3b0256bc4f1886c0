"""Stages with a state on a foreign runtime: the tensors of the state are inputs and outputs of the converted program.

    eager      step(inputs, state) -> (outputs, state)
    program    (inputs, tensors of the state) -> (outputs, tensors of the next state)

A state is tensors and fixed things (counters, None, how many frames wait). While only the tensors change, the program
is the same; where the fixed things or the shapes change from tick to tick (a layer with a temporal stride counts),
there is one program for each kind of tick. Which kinds there are is found by running the stages in eager, frame after
frame, until they come again. The ticks before that (a window that fills up), ticks like no other at the end, and those
that only keep a frame for later run in eager. The state stays the same value as in eager, so it can be read, kept and
handed from one back end to another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sidestream.circuit.calls import perturbed
from sidestream.circuit.group import RowStep
from sidestream.circuit.segment import PieceStep, shapes_of
from sidestream.circuit.slice import ChainStep
from sidestream.circuit.stage import NOTHING, SOURCE, Stage, Stages, State, Values
from sidestream.engine.backends.operators import only_moves
from sidestream.engine.backends.tensors import BackendOptions, cannot

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
    ticks: Sequence[Ticks] | None,
    compile_stage: Callable[[Stage, BackendOptions], Stage],
    options: BackendOptions,
    backend: str,
) -> Stage:
    """The stage with every part on ``backend``. Raises BackendError."""
    if ticks is None:
        raise cannot(stage.name, backend, "its state still changes its shapes after many frames: it grows, or counts")
    return _with_parts(stage, [_part_on(each, compile_stage, options, backend) for each in ticks], backend)


def _with_parts(stage: Stage, parts: Sequence[Stage], backend: str) -> Stage:
    if not isinstance(stage.step, RowStep):
        return replace(parts[0], backend=backend)

    def twin() -> Stage:
        return _with_parts(stage, [part.twin() for part in parts], backend)

    row = replace(stage.step, parts=tuple(parts))
    return replace(stage, step=row, guard=row.guard, copy=twin, backend=backend)


def _part_on(
    ticks: Ticks, compile_stage: Callable[[Stage, BackendOptions], Stage], options: BackendOptions, backend: str
) -> Stage:
    part = ticks.part
    if not part.is_stateful and not isinstance(part.step, ChainStep):
        return _idle_on_nothing(compile_stage(part, options))
    if not isinstance(part.module, nn.Module):
        raise cannot(part.name, backend, "it has no nn.Module behind it that could be exported")
    programs, guards = {}, [part.guard]
    for kind, (inputs, state) in ticks.kinds.items():
        if only_moves(partial(part.step, inputs, state)):
            programs[kind] = part.step
            continue
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


def _idle_on_nothing(part: Stage) -> Stage:
    """A converted part without state: the same program in every tick that reaches it."""

    def twin() -> Stage:
        return _idle_on_nothing(part.twin())

    return replace(part, step=ProgramStep({}, part.step, part.num_outputs), copy=twin)


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
    )


def _spec_after(part: Stage, inputs: Values, state: State) -> pytree.TreeSpec:
    return pytree.tree_structure(part.step(inputs, state)[1])


def _unflattened(step: Any, num_outputs: int, spec: pytree.TreeSpec) -> Callable[[Values, State], tuple[Values, State]]:
    def run(inputs: Values, state: State) -> tuple[Values, State]:
        values, _ = step((*inputs, *pytree.tree_leaves(state)), None)
        return values[:num_outputs], pytree.tree_unflatten(list(values[num_outputs:]), spec)

    return run


def ticks_of(stages: Stages) -> list[list[Ticks] | None]:
    """For each stage and part: the kinds of its ticks, once the stream is under way; None for a stage whose ticks never
    come again. Runs the stages in eager."""
    period = math.lcm(*(stage.period_ticks for stage in stages))
    stream, started = _Stream(stages), time.perf_counter()
    with torch.inference_mode():
        while (cycle := _cycle(stream.seen, period)) is None:
            if len(stream.seen) > MOST_TICKS + 2 * period or time.perf_counter() - started > MOST_SECONDS:
                break
            stream.tick()
        cycles = [_cycle([tick[n] for tick in stream.seen], period) for n in range(len(stages))]
        for _ in range(cycle or max(filter(None, cycles), default=0)):
            stream.tick(keeps=True)
    return [None if own is None else row.ticks for row, own in zip(stream.rows, cycles)]


def _cycle(seen: Sequence[Any], period: int) -> int | None:
    """The number of ticks after which all kinds came again, in the latest two rounds; None: not yet."""
    for length in range(period, period * MOST_PERIODS + 1, period):
        if len(seen) >= 2 * length and seen[-2 * length : -length] == seen[-length:]:
            return length
    return None


class _Stream:
    """Frame after frame through the stages, in eager."""

    def __init__(self, stages: Stages) -> None:
        assert stages.example is not None
        self.rows = [_Watched(stage) for stage in stages]
        self.seen: list[list[list[set[Kind]]]] = []
        """Per tick, stage by stage, part by part."""
        self._stages, self._state = stages, [row.stage.begin() for row in self.rows]

    def tick(self, *, keeps: bool = False) -> None:
        """One frame. ``keeps``: what each part was given is an example of its kind of tick."""
        assert self._stages.example is not None
        frame = perturbed(self._stages.example, seed=len(self.seen))
        values: dict[tuple[int, int], Any] = {(SOURCE, n): leaf for n, leaf in enumerate(pytree.tree_leaves(frame))}
        for number, row in enumerate(self.rows, start=1):
            inputs = self._stages.inputs_of(values, number)
            outputs: Values = (NOTHING,) * row.stage.num_outputs
            if not any(value is NOTHING for value in inputs):
                outputs, self._state[number - 1] = row.stage.step(inputs, self._state[number - 1])
            values |= {(number, n): value for n, value in enumerate(outputs)}
        self.seen.append([row.taken(keeps) for row in self.rows])


class _Watched:
    """A stage whose parts note the kind of every tick."""

    def __init__(self, stage: Stage) -> None:
        parts = stage.step.parts if isinstance(stage.step, RowStep) else (stage,)
        self.ticks = [Ticks(part, {}) for part in parts]
        self._now: list[dict[Kind, tuple[Values, State]]] = [{} for _ in parts]
        noted = [self._noted(n, part) for n, part in enumerate(parts)]
        if isinstance(stage.step, RowStep):
            self.stage = replace(stage, step=replace(stage.step, parts=tuple(noted)))
        else:
            self.stage = noted[0]

    def _noted(self, n: int, part: Stage) -> Stage:
        def step(inputs: Values, state: State) -> tuple[Values, State]:
            self._now[n][kind_of(inputs, state)] = inputs, state
            return part.step(inputs, state)

        return replace(part, step=step)

    def taken(self, keeps: bool) -> list[set[Kind]]:
        """The kinds of a tick, part by part."""
        taken, self._now = self._now, [{} for _ in self._now]
        for ticks, kinds in zip(self.ticks, taken):
            ticks.kinds.update(kinds if keeps else {})
        return [set(kinds) for kinds in taken]


def needs_ticks(stage: Stage) -> bool:
    """Whether what a stage is given changes from tick to tick: it has a state, or layers that swallow frames."""
    return not stage.hides_state and (stage.is_stateful or isinstance(stage.step, ChainStep | PieceStep | RowStep))
