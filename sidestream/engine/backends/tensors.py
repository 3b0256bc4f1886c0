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
from sidestream.errors import BackendError, LayoutError

Runtime = Callable[[list[Tensor]], Sequence[Tensor]]
"""Tensors in, tensors out; the outputs are the caller's own and are never written again."""

ROUNDING = {"float32": 1e-3, "bfloat16": 1e-1}
"""How far a converted stage may be from eager on its example, relative to the largest output: wrong, not rounded."""


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """How a back end should run every stage."""

    precision: str = "float32"
    """Arithmetic inside a stage: "float32", or "bfloat16" where the back end knows it; wires stay as they are."""
    num_threads: int = 1
    """Threads inside one stage (the ``threads`` executor wants 1)."""


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
    example: Values
    fed: tuple[int, ...]
    routes: tuple[Route, ...]
    expected: tuple[Tensor, ...]
    """What eager answers to the example, for the routes of kind "runtime"."""

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
            elif value is not example and value != example:
                raise LayoutError(self._refusal(i, value, example))
        return [inputs[i] for i in self.fed]

    def outputs(self, inputs: Values, answers: Sequence[Tensor]) -> Values:
        """The stage's flat outputs from the runtime's answers."""
        pick = {"runtime": lambda r: answers[r.number], "input": lambda r: inputs[r.number]}
        return tuple(route.value if route.kind == "constant" else pick[route.kind](route) for route in self.routes)

    def _refusal(self, i: int, value: Any, example: Any) -> str:
        return (
            f"input {i} of stage {self.name!r} was given {_describe(value)}, but the stage was converted for "
            f"{_describe(example)}; feed frames like the example, or cut the model again with an example like these"
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
    with torch.no_grad():
        outputs = stage.step(stage.example_inputs, None)[0]
        answered = flat_outputs(stage.module(*stage.example_inputs))
    if len(answered) != len(outputs):
        raise cannot(stage.name, backend, f"its module gives {len(answered)} values and its step {len(outputs)}")
    fed = tuple(i for i, value in enumerate(stage.example_inputs) if isinstance(value, Tensor))
    routes, expected = _routes(stage.example_inputs, answered)
    return Plan(stage.name, stage.module, stage.example_inputs, fed, routes, expected)


def converted(stage: Stage, plan: Plan, backend: str, runtime: Runtime) -> Stage:
    """``stage`` with ``runtime`` instead of its module; no copy function, so ``runtime`` must be thread-safe."""

    def step(inputs: Values, state: State) -> tuple[Values, State]:
        return plan.outputs(inputs, runtime(plan.fed_tensors(inputs))), state

    return replace(stage, step=step, backend=backend, copy=None)


def check(plan: Plan, backend: str, runtime: Runtime, precision: str = "float32") -> None:
    """Raise BackendError unless ``runtime`` answers the example as eager does (up to rounding)."""
    answers = runtime(plan.tensors)
    for n, (answer, expected) in enumerate(zip(answers, plan.expected, strict=True)):
        if answer.shape != expected.shape or answer.dtype != expected.dtype:
            wrong = f"its answer {n} is {_describe(answer)} where eager gives {_describe(expected)}"
            raise cannot(plan.name, backend, wrong)
        if not expected.is_floating_point():
            if not torch.equal(answer, expected):
                raise cannot(plan.name, backend, f"its answer {n} is not eager's")
            continue
        if expected.numel() == 0:
            continue
        error = (answer - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
        if torch.isfinite(expected).all() and not error <= ROUNDING[precision]:
            raise cannot(plan.name, backend, f"its answer {n} differs from eager by {float(error):.1e} of the largest")


def cannot(name: str, backend: str, reason: str) -> BackendError:
    """The error for a stage that a back end cannot run."""
    return BackendError(
        f"the back end {backend!r} cannot run stage {name!r}: {reason}; "
        "use the back end 'eager' (compile_stages can also keep only such stages in eager: on_unsupported='eager')"
    )


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


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {str(value.dtype).removeprefix('torch.')}"
    return repr(value)
