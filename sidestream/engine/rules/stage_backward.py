"""One stage forward with its graph recorded, and the vector-Jacobian product back through it: pure functions.

What a stage sends back is a cotangent, the gradient of the loss in one of its inputs, as a ``Message`` with the frames
that the loss belongs to; ``NO_GRADIENT`` where the loss does not depend on that input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils import _pytree as pytree

from sidestream.circuit.stage import NOTHING, State, Values
from sidestream.engine.tick import Message


class _NoGradient:
    """The cotangent of something that the loss does not depend on. There is only one."""

    def __repr__(self) -> str:
        return "NO_GRADIENT"


NO_GRADIENT = _NoGradient()
Step = Callable[[Values, State], tuple[Values, State]]
Frames = tuple[int | None, int | None]
"""The oldest and the newest frame."""
Gradients = dict[str, Tensor]
"""Gradient of each parameter that the loss depends on, by name."""


@dataclass(slots=True)
class Work:
    """What a stage did on one input; with the graph behind its outputs, where that was recorded."""

    inputs: Values
    outputs: Values
    oldest: int | None
    newest: int | None

    def messages(self) -> list[Message]:
        """The outputs as they go on: values only, no graph."""
        return [Message(_detached(value), self.oldest, self.newest) for value in self.outputs]


def work(
    step: Step, given: Sequence[Message], state: State, *, wants: Sequence[bool], records: bool
) -> tuple[Work, State]:
    """One step on what the messages bring. ``wants``: which inputs shall have cotangents; ``records``: the graph.

    The state goes in and out without a graph: no gradient crosses from one tick to the next.
    """
    inputs = tuple(_leaf(m.value, wanted and records) for m, wanted in zip(given, wants, strict=True))
    with torch.inference_mode(False), torch.set_grad_enabled(records):
        outputs, state = step(inputs, state)
    return Work(inputs, tuple(outputs), *frames_of(given)), pytree.tree_map(_detached, state)


def work_through(
    step: Step,
    window: Sequence[Sequence[Message]],
    state: State,
    *,
    wants: Sequence[bool],
    newest_only: bool = False,
) -> Work:
    """Steps in a row with one graph through them and the state between them: the work on the last of ``window``.

    Its inputs are those of all steps, one after the other; ``newest_only``: no cotangents for those before the last.
    """
    inputs: list[Any] = []
    outputs: Values = ()
    for number, given in enumerate(window, start=1):
        is_asked = number == len(window) or not newest_only
        leaves = [_leaf(m.value, wanted and is_asked) for m, wanted in zip(given, wants, strict=True)]
        inputs += leaves
        with torch.inference_mode(False), torch.enable_grad():
            outputs, state = step(tuple(leaves), state)
    return Work(tuple(inputs), tuple(outputs), *frames_of(window[-1]))


def frames_of(messages: Sequence[Message | None]) -> Frames:
    """The oldest and the newest frame that the messages are about."""
    oldest = min((m.oldest for m in messages if m is not None and m.oldest is not None), default=None)
    newest = max((m.newest for m in messages if m is not None and m.newest is not None), default=None)
    return oldest, newest


def pull_back(
    done: Work, cotangents: Mapping[int, Tensor], parameters: Mapping[str, Parameter]
) -> tuple[Gradients, list[Any]]:
    """The vector-Jacobian product at ``done``: gradients of the parameters, and one cotangent per input.

    ``cotangents``: by output. An input that the outputs do not depend on has ``NO_GRADIENT``.
    """
    reached = [(done.outputs[n], c) for n, c in sorted(cotangents.items()) if _has_graph(done.outputs[n])]
    asked = [n for n, value in enumerate(done.inputs) if isinstance(value, Tensor) and value.requires_grad]
    names = list(parameters)
    wanted = [*parameters.values(), *(done.inputs[n] for n in asked)]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if reached and wanted:
        outputs, seeds = zip(*reached, strict=True)
        with torch.inference_mode(False):
            found = torch.autograd.grad(outputs, wanted, seeds, allow_unused=True)
    gradients = {name: g for name, g in zip(names, found) if g is not None}
    sent: list[Any] = [NO_GRADIENT] * len(done.inputs)
    for n, g in zip(asked, found[len(names) :], strict=True):
        sent[n] = NO_GRADIENT if g is None else g
    return gradients, sent


def summed(outputs: Sequence[int], messages: Sequence[Message | None]) -> dict[int, Tensor]:
    """Cotangents added up per output, in the order given; ``outputs[n]`` is what ``messages[n]`` is about."""
    totals: dict[int, Tensor] = {}
    for output, message in zip(outputs, messages, strict=True):
        if message is not None and message.value is not NO_GRADIENT:
            totals[output] = totals[output] + message.value if output in totals else message.value
    return totals


def swallowed(values: Sequence[Any]) -> bool:
    """Whether there is nothing in this tick."""
    return any(value is NOTHING for value in values)


def _leaf(value: Any, wanted: bool) -> Any:
    """A tensor outside of any graph, at which one may begin."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(wanted and (value.is_floating_point() or value.is_complex()))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _has_graph(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
