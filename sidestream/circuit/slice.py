"""Layers of a Chain that run as they are, one behind the other, as one stage with their states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sidestream.circuit.measure import num_bytes
from sidestream.circuit.stage import NOTHING, Stage, State, Values
from sidestream.errors import LayoutError
from sidestream.nn.combine import Chain
from sidestream.nn.steppable import Steppable


@dataclass(frozen=True, eq=False)
class ChainStep:
    """``step`` of a stage that is part of a chain; ``in_spec`` is the structure of what it is fed."""

    chain: Chain
    in_spec: pytree.TreeSpec
    no_memory: State = None
    """What the chain is given as its state where none of its layers has memory (nothing but Nones, but in the
    structure that residual and parallel layers look for); None where the stage carries a state."""
    check: tuple[torch.Size, torch.dtype] | None = None
    """Shape and type of the frame, for the stage that reads the source."""
    num_outputs: int = 1

    def __call__(self, inputs: Values, state: State) -> tuple[Values, State]:
        with torch.no_grad():
            return self.with_gradients(inputs, state)

    def with_gradients(self, inputs: Values, state: State) -> tuple[Values, State]:
        """The same step in whatever gradient mode it is called in: what training calls."""
        if any(value is NOTHING for value in inputs):
            return (NOTHING,) * self.num_outputs, state
        if self.check is not None and (inputs[0].shape, inputs[0].dtype) != self.check:
            raise LayoutError(
                f"the frame was given with the shape {tuple(inputs[0].shape)}, {inputs[0].dtype}, but the chain was "
                f"cut for {tuple(self.check[0])}, {self.check[1]}; feed that, or cut again with such an example"
            )
        is_stateful = self.no_memory is None
        own_state = state if is_stateful else self.no_memory
        answer, new_state = self.chain.step(pytree.tree_unflatten(inputs, self.in_spec), own_state)
        answers = (NOTHING,) * self.num_outputs if answer is NOTHING else tuple(pytree.tree_leaves(answer))
        return answers, new_state if is_stateful else state


Blank = tuple[pytree.TreeSpec, tuple[tuple[torch.Size, torch.dtype, torch.device], ...]]
"""What a layer is fed, without its values."""


@dataclass(frozen=True, eq=False)
class ChainState:
    """``init_state`` of a stage that is part of a chain; remembers only the shapes of what each layer is fed, so that
    the start of a stream costs no step."""

    chain: Chain
    blanks: tuple[Blank, ...]

    def __call__(self) -> State:
        states = []
        for layer, (spec, shapes) in zip(self.chain.layers, self.blanks, strict=True):
            leaves = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in shapes]
            with torch.no_grad():
                states.append(layer.init_state(pytree.tree_unflatten(leaves, spec)))
        return tuple(states)


@dataclass(frozen=True, eq=False)
class ChainFinish:
    """``finish`` of a stage that is part of a chain."""

    chain: Chain

    def __call__(self, state: State) -> Sequence[Values]:
        with torch.no_grad():
            return [tuple(pytree.tree_leaves(answer)) for answer in self.chain.finish(state)]


def stage_of_layers(
    layers: dict[str, Steppable], values: Sequence[Any], cost_seconds: float | None, *, is_first: bool
) -> Stage:
    """``values``: what goes into each layer, and the answer of the last."""
    chain, names = Chain(*layers.values()), list(layers)
    chain.training = all(layer.training for layer in layers.values())  # the flag only: the layers are the user's
    leaves, in_spec = pytree.tree_flatten(values[0])
    init_state = ChainState(chain, tuple(_blank(value) for value in values[:-1]))
    first_state = init_state()
    is_stateful = any(leaf is not None for leaf in pytree.tree_leaves(first_state))
    no_memory = None if is_stateful else first_state
    outputs = pytree.tree_leaves(values[-1])
    checked = (leaves[0].shape, leaves[0].dtype) if is_first else None
    return Stage(
        name=names[0] if len(names) == 1 else f"{names[0]}-{names[-1]}",
        step=ChainStep(chain, in_spec, no_memory, checked, len(outputs)),
        num_inputs=len(leaves),
        num_outputs=len(outputs),
        init_state=init_state if is_stateful else None,
        finish=ChainFinish(chain) if is_stateful else None,
        cost_seconds=cost_seconds,
        output_bytes=tuple(num_bytes(value) for value in outputs),
        module=chain,
        example_inputs=tuple(leaves),
    )


def _blank(value: Any) -> Blank:
    leaves, spec = pytree.tree_flatten(value)
    return spec, tuple((x.shape, x.dtype, x.device) for x in leaves)
