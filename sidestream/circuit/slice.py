"""A Chain of streaming layers in stages: cut between layers, each stage with the state of its own layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from sidestream.circuit.balance import balanced
from sidestream.circuit.chain_costs import seconds_of, weights_of
from sidestream.circuit.measure import Costs, num_bytes
from sidestream.circuit.names import check_names, check_order
from sidestream.circuit.stage import NOTHING, Link, Stage, State, Values
from sidestream.errors import CutError, LayoutError
from sidestream.models.info import info_of
from sidestream.nn.combine import Chain
from sidestream.nn.sliding import SlidingWindow
from sidestream.nn.steppable import Steppable
from sidestream.report.words import counted

Sliced = tuple[tuple[Stage, ...], tuple[Link, ...], pytree.TreeSpec, pytree.TreeSpec]


def slice_chain(
    chain: Chain,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    names: tuple[str, ...] | None,
    num_stages: int | str,
    costs: Costs,
    num_workers: int,
) -> Sliced:
    """Stages, links, and the structures of input and answer. The example is one frame."""
    if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor):
        raise CutError("a Chain is cut with one frame as the example: cut(chain, frame_BCHW)")
    layers = dict(_flat_layers(chain))
    _check_places(layers, num_stages)
    values = _values(layers.values(), args[0])
    seconds = seconds_of(layers.values(), values) if costs == "measured" else None
    weights = seconds if seconds is not None else weights_of(layers, costs)
    if names is None:
        crossings = [float(num_bytes(value)) for value in values[:-1]]
        boundaries = balanced(weights, crossings, num_stages, num_workers=num_workers)
    else:
        boundaries = _named(tuple(layers), names)
    starts, stages = [0, *boundaries], []
    for start, end in zip(starts, [*boundaries, len(layers)]):
        part = dict(list(layers.items())[start:end])
        cost_seconds = None if seconds is None else sum(seconds[start:end])
        stage = _stage(part, values[start : end + 1], cost_seconds, is_first=start == 0)
        so_far = Chain(*list(layers.values())[:end])
        stages.append(replace(stage, delay_ticks=so_far.delay_ticks, period_ticks=so_far.period_ticks))
    in_spec, out_spec = pytree.tree_structure((args, kwargs)), pytree.tree_structure(values[-1])
    return tuple(stages), _links(stages), in_spec, out_spec


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


def _stage(layers: dict[str, Steppable], values: Sequence[Any], cost_seconds: float | None, *, is_first: bool) -> Stage:
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


def _check_places(layers: dict[str, Steppable], num_stages: int | str) -> None:
    """Refuse more stages than layers before anything is measured."""
    if not isinstance(num_stages, int) or num_stages <= len(layers):
        return
    windows = [layer.model for layer in layers.values() if isinstance(layer, SlidingWindow)]
    why = f": {_name_of(windows[0])} has no exact step form and stays whole, behind a sliding window" if windows else ""
    raise CutError(
        f"the model has {counted(len(layers), 'place')} where a stage can begin, too few for {num_stages = }{why}; "
        f'ask for {len(layers)} at most, or "auto"'
    )


def _name_of(model: nn.Module) -> str:
    info = info_of(model)
    return type(model).__name__ if info is None else info.name


def _flat_layers(chain: Chain, prefix: str = "") -> list[tuple[str, Steppable]]:
    """Layers of a chain, chains inside of it opened, with their dotted names."""
    flat: list[tuple[str, Steppable]] = []
    for n, layer in enumerate(chain.layers):
        name = f"{prefix}{n}"
        flat += _flat_layers(layer, f"{name}.") if isinstance(layer, Chain) else [(name, layer)]
    return flat


def _values(layers: Iterable[Steppable], frame_BCHW: torch.Tensor) -> list[Any]:
    """What goes into each layer, and the answer; behind the first layer only shapes and types count."""
    values: list[Any] = [frame_BCHW]
    for layer in layers:
        values.append(layer.blank(values[-1]))
    return values


def _named(known: tuple[str, ...], names: tuple[str, ...]) -> tuple[int, ...]:
    """Where the named layers (or chains inside of the chain) begin."""
    inner = dict.fromkeys(name.rsplit(".", n)[0] for name in known for n in range(name.count(".") + 1))
    check_names(names, list(inner))
    boundaries = [next(n for n, k in enumerate(known) if f"{k}.".startswith(f"{name}.")) for name in names]
    check_order(names, boundaries)
    return tuple(boundaries)


def _links(stages: Sequence[Stage]) -> tuple[Link, ...]:
    widths = [stage.num_inputs for stage in stages] + [stages[-1].num_outputs]
    return tuple(Link(number, n, number + 1, n) for number, width in enumerate(widths) for n in range(width))
