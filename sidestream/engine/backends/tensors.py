"""A stage as a function of tensors alone: what a foreign runtime can be given, and the way back.

A stage takes and gives flat values; most are tensors, some are numbers or None, and some outputs are inputs
handed through. A runtime knows only tensors, so a ``Plan`` is drawn once, from one run on the stage's example:

    stage inputs      (x, 0.5, skip)                 fed     = 0, 2      the runtime gets x and skip
    stage outputs     (y, skip, 7)                   routes  = runtime 0, input 2, constant 7

Inputs that are no tensors are part of the converted program: another value is refused, not ignored. Inputs that
are handed through never reach the runtime: the very same tensor comes out, as in eager.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sidestream.circuit.stage import Stage, State, Values
from sidestream.engine.backends.operators import Operators
from sidestream.engine.backends.rounding import distance, largest_of
from sidestream.engine.backends.weights import Weights, guard, weights_of
from sidestream.errors import BackendError, LayoutError

Runtime = Callable[[list[Tensor]], Sequence[Tensor]]
"""Tensors in, tensors out; the outputs are the caller's own and are never written again."""

Level = Literal["full", "once", "off"]
"""On what a converted stage is compared with eager: many inputs (``check.py``), its example, or nothing."""
REPEATS = 1e-3
"""How far two runs of eager on one input may be apart, relative to the largest output: it draws, or it is rounded."""


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """How a back end should run every stage."""

    precision: str = "float32"
    """Arithmetic inside a stage: "float32", or "bfloat16" where the back end knows it; wires stay as they are."""
    num_threads: int = 1
    """Threads inside one stage (the ``threads`` executor wants 1)."""
    check: Level = "full"


@dataclass(frozen=True)
class Route:
    """Where an output of the stage comes from."""

    kind: Literal["runtime", "input", "constant"]
    number: int = -1
    """Which output of the runtime, or which input of the stage."""
    value: Any = None


@dataclass(frozen=True)
class Plan:
    """How a stage's flat values map to a runtime's tensors."""

    name: str
    module: nn.Module
    step: Callable[[Values, State], tuple[Values, State]]
    """The stage in eager."""
    example: Values
    """Like the stage's, every tensor in memory of its own."""
    fed: tuple[int, ...]
    routes: tuple[Route, ...]
    expected: tuple[Tensor, ...]
    """What eager answers to the example, for the routes of kind "runtime"."""
    answered: Values
    """What eager answers to the example, all of it."""
    weights: Weights
    """What the module holds."""

    @property
    def tensors(self) -> list[Tensor]:
        """The example as the runtime sees it."""
        return [self.example[i] for i in self.fed]

    def fed_tensors(self, inputs: Values) -> list[Tensor]:
        """The tensors among ``inputs``, refused when they are not what the stage was converted for."""
        for i, (value, example) in enumerate(zip(inputs, self.example, strict=True)):
            if isinstance(example, Tensor):
                if not isinstance(value, Tensor) or value.shape != example.shape or value.dtype != example.dtype:
                    raise LayoutError(self._refusal(i, value, example))
            elif not same(value, example):
                raise LayoutError(self._refusal(i, value, example))
        return [inputs[i] for i in self.fed]

    def outputs(self, inputs: Values, answers: Sequence[Tensor]) -> Values:
        """The stage's flat outputs from the runtime's answers."""
        pick = {"runtime": lambda r: answers[r.number], "input": lambda r: inputs[r.number]}
        return tuple(route.value if route.kind == "constant" else pick[route.kind](route) for route in self.routes)

    def _refusal(self, i: int, value: Any, example: Any) -> str:
        return (
            f"input {i} of stage {self.name!r} was given {described(value)}, but the stage was converted for "
            f"{described(example)}; feed frames like the example, or cut the model again with an example like these"
        )


class TensorModule(nn.Module):
    """The module behind a plan with tensors only: what an exporter or a compiler is given."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.training = False  # of this wrapper only: exporters ask, and the module stays in the mode it is in
        self.module = plan.module
        self._fed = plan.fed
        self._fixed = tuple(None if isinstance(value, Tensor) else value for value in plan.example)
        numbers = [route.number for route in plan.routes if route.kind == "runtime"]
        self._kept = [
            next(n for n, r in enumerate(plan.routes) if r == Route("runtime", k)) for k in sorted({*numbers})
        ]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = list(self._fixed)
        for i, tensor in zip(self._fed, tensors, strict=True):
            inputs[i] = tensor
        outputs = flat_outputs(self.module(*inputs))
        return tuple(outputs[n] for n in self._kept)


def flat_outputs(answer: Any) -> Values:
    """What a module returned, as flat values."""
    return tuple(pytree.tree_leaves(answer))


def draw_plan(stage: Stage, backend: str) -> Plan:
    """One eager run of ``stage`` on its example. Raises BackendError when the stage cannot be converted at all."""
    if stage.is_stateful:
        raise cannot(stage.name, backend, "it carries state from one tick to the next")
    if not isinstance(stage.module, nn.Module):
        raise cannot(stage.name, backend, "it has no nn.Module behind it that could be exported")
    if stage.example_inputs is None:
        raise cannot(stage.name, backend, "it was made without example inputs, so their shapes are unknown")
    if len(stage.example_inputs) != stage.num_inputs:
        given = f"{len(stage.example_inputs)} example inputs for its {stage.num_inputs} inputs"
        raise cannot(stage.name, backend, f"it has {given}")
    example = tuple(_own(value) for value in stage.example_inputs)
    weights = weights_of(stage.module)
    outputs, answered = _run_twice(stage, stage.module, example, weights, backend)
    fed = tuple(i for i, value in enumerate(example) if isinstance(value, Tensor))
    routes, expected = _routes(example, answered)
    return Plan(stage.name, stage.module, stage.step, example, fed, routes, expected, outputs, weights)


def converted(stage: Stage, plan: Plan, backend: str, runtime: Runtime) -> Stage:
    """``stage`` with ``runtime`` instead of its module; no copy function, so ``runtime`` must be thread-safe.

    Its guard raises CircuitError when the module's weights are no longer those that were converted.
    """
    slim = replace(plan, expected=(), answered=())

    def step(inputs: Values, state: State) -> tuple[Values, State]:
        return slim.outputs(inputs, runtime(slim.fed_tensors(inputs))), state

    unchanged = guard(plan.weights, stage.name, backend, stage.guard)
    return replace(stage, step=step, backend=backend, copy=None, guard=unchanged)


def cannot(name: str, backend: str, reason: str) -> BackendError:
    """The error for a stage that a back end cannot run."""
    return BackendError(
        f"the back end {backend!r} cannot run stage {name!r}: {reason}; "
        "use the back end 'eager' (compile_stages can also keep only such stages in eager: on_unsupported='eager')"
    )


def _run_twice(
    stage: Stage, module: nn.Module, example: Values, weights: Weights, backend: str
) -> tuple[Values, Values]:
    """What step and module answer to ``example``; refused when they draw, write to what they hold, or disagree."""
    given = tuple(_own(value) for value in example)
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    random_state = torch.get_rng_state()
    operators = Operators(backend)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        outputs = stage.step(example, None)[0]
        with operators:
            answered = flat_outputs(module(*example))
        draws = not torch.equal(torch.get_rng_state(), random_state)
    if (name := _restored(weights, buffers)) is not None:
        raise cannot(stage.name, backend, f"it writes to its own {name!r} while it works")
    if not all(map(_repeats, example, given)):
        raise cannot(stage.name, backend, "it changes its inputs in place")
    if len(answered) != len(outputs):
        raise cannot(stage.name, backend, f"its module gives {len(answered)} values and its step {len(outputs)}")
    if draws or not all(map(_repeats, outputs, answered)):
        raise cannot(stage.name, backend, "two runs on the same inputs differ, or it draws random numbers")
    if operators.found:
        raise cannot(stage.name, backend, f"it contains {operators.found[0]}")
    return outputs, answered


def _restored(weights: Weights, buffers: list[tuple[Tensor, Tensor]]) -> str | None:
    """Put back what a run has written over; the name of the first such tensor, or None."""
    name = weights.changed()
    if name is not None:
        for held in weights.held:
            held.owner[held.key] = held.tensor
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return name


def _own(value: Any) -> Any:
    """Tensors that share memory are told apart by an exporter, and by whoever looks which input came through."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def _repeats(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return same(one, other)
    if one.shape != other.shape or one.dtype != other.dtype or one.numel() == 0:
        return one.shape == other.shape and one.dtype == other.dtype
    return bool(distance(one, other).max() <= REPEATS * largest_of(other))


def _routes(inputs: Values, outputs: Values) -> tuple[tuple[Route, ...], tuple[Tensor, ...]]:
    routes: list[Route] = []
    expected: list[Tensor] = []
    for value in outputs:
        if not isinstance(value, Tensor):
            routes.append(Route("constant", value=value))
        elif (i := _find(value, inputs)) is not None:
            routes.append(Route("input", i))
        else:
            n = _find(value, expected)
            if n is None:
                n = len(expected)
                expected.append(value)
            routes.append(Route("runtime", n))
    return tuple(routes), tuple(expected)


def _find(value: Any, among: Sequence[Any]) -> int | None:
    return next((i for i, other in enumerate(among) if other is value), None)


def same(one: Any, other: Any) -> bool:
    """Whether two values that are no tensors are equal (NaN is equal to NaN)."""
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    return bool(one == other) or bool(one != one and other != other)


def described(value: Any) -> str:
    """A value in words: a tensor by shape and type."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {str(value.dtype).removeprefix('torch.')}"
    return repr(value)
