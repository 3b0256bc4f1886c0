"""A Chain of streaming layers in stages: cut between layers, each stage with the state of its own layers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sidestream.circuit.balance import balanced
from sidestream.circuit.measure import Costs, given_costs, num_bytes, one_thread
from sidestream.circuit.names import check_names, check_order
from sidestream.circuit.stage import NOTHING, Link, Stage, State, Values
from sidestream.errors import CutError, LayoutError
from sidestream.nn.combine import Chain
from sidestream.nn.steppable import Steppable

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
    values = _values(layers.values(), args[0])
    seconds = _seconds(layers.values(), values) if costs == "measured" else None
    weights = seconds if seconds is not None else _weights(layers, costs)
    if names is None:
        crossings = [float(num_bytes(value)) for value in values[:-1]]
        boundaries = balanced(weights, crossings, num_stages, num_workers=num_workers)
    else:
        boundaries = _named(tuple(layers), names)
    starts, stages = [0, *boundaries], []
    for start, end in zip(starts, [*boundaries, len(layers)]):
        part = dict(list(layers.items())[start:end])
        cost_seconds = None if seconds is None else sum(seconds[start:end])
        stage = _stage(part, values[start], values[end], cost_seconds, is_first=start == 0)
        so_far = Chain(*list(layers.values())[:end])
        stages.append(replace(stage, delay_ticks=so_far.delay_ticks, period_ticks=so_far.period_ticks))
    in_spec, out_spec = pytree.tree_structure((args, kwargs)), pytree.tree_structure(values[-1])
    return tuple(stages), _links(stages), in_spec, out_spec


@dataclass(frozen=True, eq=False)
class ChainStep:
    """``step`` of a stage that is part of a chain; ``in_spec`` is the structure of what it is fed."""

    chain: Chain
    in_spec: pytree.TreeSpec
    is_stateful: bool
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
        own_state = state if self.is_stateful else (None,) * len(self.chain.layers)
        answer, new_state = self.chain.step(pytree.tree_unflatten(inputs, self.in_spec), own_state)
        answers = (NOTHING,) * self.num_outputs if answer is NOTHING else tuple(pytree.tree_leaves(answer))
        return answers, new_state if self.is_stateful else state


@dataclass(frozen=True, eq=False)
class ChainState:
    """``init_state`` of a stage that is part of a chain; remembers only the shape of what the stage is fed."""

    chain: Chain
    in_spec: pytree.TreeSpec
    shapes: tuple[tuple[torch.Size, torch.dtype, torch.device], ...]

    def __call__(self) -> State:
        blanks = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in self.shapes]
        with torch.no_grad():
            return self.chain.init_state(pytree.tree_unflatten(blanks, self.in_spec))


@dataclass(frozen=True, eq=False)
class ChainFinish:
    """``finish`` of a stage that is part of a chain."""

    chain: Chain

    def __call__(self, state: State) -> Sequence[Values]:
        with torch.no_grad():
            return [tuple(pytree.tree_leaves(answer)) for answer in self.chain.finish(state)]


def _stage(layers: dict[str, Steppable], given: Any, made: Any, cost_seconds: float | None, *, is_first: bool) -> Stage:
    chain, names = Chain(*layers.values()), list(layers)
    chain.training = all(layer.training for layer in layers.values())  # the flag only: the layers are the user's
    leaves, in_spec = pytree.tree_flatten(given)
    shapes = tuple((x.shape, x.dtype, x.device) for x in leaves)
    init_state = ChainState(chain, in_spec, shapes)
    is_stateful = any(leaf is not None for leaf in pytree.tree_leaves(init_state()))
    outputs = pytree.tree_leaves(made)
    return Stage(
        name=names[0] if len(names) == 1 else f"{names[0]}-{names[-1]}",
        step=ChainStep(chain, in_spec, is_stateful, shapes[0][:2] if is_first else None, len(outputs)),
        num_inputs=len(leaves),
        num_outputs=len(outputs),
        init_state=init_state if is_stateful else None,
        finish=ChainFinish(chain) if is_stateful else None,
        cost_seconds=cost_seconds,
        output_bytes=tuple(num_bytes(value) for value in outputs),
        module=chain,
        example_inputs=tuple(leaves),
    )


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


def _seconds(layers: Iterable[Steppable], values: Sequence[Any], num_runs: int = 7) -> list[float]:
    """Seconds of a step of each layer on one thread: the least of ``num_runs`` after a warm-up, fewer when slow."""
    least = []
    with one_thread(), torch.no_grad():
        for layer, value in zip(layers, values):
            state = _answering_state(layer, value)
            times: list[float] = []
            layer.step(value, state)
            while len(times) < num_runs and sum(times) < 0.5:
                start = time.perf_counter()
                layer.step(value, state)
                times.append(time.perf_counter() - start)
            least.append(min(times))
    return least


def _answering_state(layer: Steppable, value: Any) -> State:
    """A state in which the next step answers: a step that swallows its frame costs next to nothing."""
    state = layer.init_state(value)
    while True:
        answer, next_state = layer.step(value, state)
        if answer is not NOTHING:
            return state
        state = next_state


def _weights(layers: dict[str, Steppable], costs: Costs) -> list[float]:
    if not isinstance(costs, str):
        return given_costs(costs, len(layers))
    if costs == "parameters":
        return [float(sum(p.numel() for p in layer.parameters())) for layer in layers.values()]
    if costs == "uniform":
        return [1.0] * len(layers)
    raise CutError(f"costs={costs!r} is unknown for a Chain; choose measured, parameters or uniform, or give numbers")


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
