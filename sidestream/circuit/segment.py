"""Streaming layers as one graph: the step of a run of layers, with the tensors of their state as inputs and outputs.

    layers     (frame, state of layer 1, state of layer 2 ...) -> (answer, next states)
    graph      placeholders frame, s1, s2 ...    outputs answer, s1', s2' ...

It can be cut like any module, inside of encoders and residual bodies; only between the first node that reads a state
and the last one that reads it or makes its next value no boundary may fall, so that a state stays inside its stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sidestream.circuit import alias
from sidestream.circuit.calls import Found
from sidestream.circuit.measure import NodeRecord, num_bytes, record, weigh
from sidestream.circuit.parts import Parts
from sidestream.circuit.split import crossing_bytes, module_path
from sidestream.circuit.stage import NOTHING, SOURCE, Link, Stage, Stages, State, Values
from sidestream.circuit.trace import Traced, trace_exported
from sidestream.errors import CutError
from sidestream.nn.combine import Chain
from sidestream.nn.steppable import Steppable

ROOT = "chain"


class SegmentModule(nn.Module):
    """One step of a run of layers, on flat values: ``forward(frame, *tensors of the states)``."""

    def __init__(self, chain: Chain, layers: Sequence[Steppable], states: Sequence[Any]) -> None:
        super().__init__()
        self.chain = chain
        self.training = False  # the flag only: the layers are the user's
        self._layers = tuple(layers)
        leaves, self._spec = pytree.tree_flatten(tuple(states))
        self._fixed = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(self, frame: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
        leaves = list(self._fixed)
        for n, tensor in zip(self._places, tensors, strict=True):
            leaves[n] = tensor
        states, x = [], frame
        for layer, state in zip(self._layers, pytree.tree_unflatten(leaves, self._spec)):
            x, state = layer.step(x, state)
            states.append(state)
        after = pytree.tree_leaves(tuple(states))
        return (x, *(after[n] for n in self._places))


@dataclass(frozen=True)
class Segment:
    """A run of layers as a graph that can be cut; ``frame`` is what its first layer is fed."""

    parts: Parts
    num_states: int
    init_states: Callable[[], Sequence[Tensor]]
    forbidden: frozenset[int]
    """Positions among the call nodes before which no stage may begin."""
    num_answers: int
    records: Mapping[fx.Node, NodeRecord]

    @property
    def crossings(self) -> list[float]:
        """Bytes that a cut before each node would carry; states cross no cut."""
        graph = self.parts.traced.module.graph
        return crossing_bytes(graph, self.records, graph.find_nodes(op="placeholder")[:1])

    def seconds(self) -> list[float]:
        """Measured time of each node."""
        return weigh(self.parts.traced.module, self.parts.traced.leaves, "measured")

    @property
    def nodes(self) -> list[fx.Node]:
        return alias.call_nodes(self.parts.traced.module.graph)

    def stages(self, boundaries: Sequence[int], seconds: Sequence[float] | None) -> Stages:
        """The stages that begin at ``boundaries``, each with the states of its own nodes."""
        return _with_states(self, self.parts.stages(boundaries, seconds))


def is_open(layer: Steppable, frame: Any, answer: Any) -> bool:
    """Whether a layer works alike in every tick from the first one on, one tensor in and tensors out, and can so be a
    graph. ``answer``: something like what it answers."""
    if layer.training or layer.delay_ticks or layer.period_ticks != 1 or not isinstance(frame, Tensor):
        return False
    if not all(isinstance(leaf, Tensor) and leaf.numel() for leaf in pytree.tree_leaves(answer)):
        return False
    with torch.no_grad():
        state = layer.init_state(frame)
        if state is None:
            return True
        return shapes_of(layer.step(frame, state)[1]) == shapes_of(state)


def shapes_of(value: Any) -> tuple[Any, ...]:
    """What a graph has fixed of a value: structure, shapes and types of tensors, and everything that is no tensor."""
    leaves, spec = pytree.tree_flatten(value)
    return spec, *((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves)


def segment_of(
    chain: Chain, layers: Sequence[Steppable], frame: Tensor, blanks: Sequence[Tensor], found: Found
) -> Segment | None:
    """The graph of consecutive layers of ``chain``, fed with ``frame`` and what lies between them (``blanks``); None
    where it cannot be had, or writes to buffers."""

    def init() -> list[Any]:
        with torch.no_grad():
            return [layer.init_state(torch.zeros_like(x)) for layer, x in zip(layers, blanks)]

    module = SegmentModule(chain, layers, init())
    tensors = _tensors(init())
    try:
        traced = trace_exported(module, (frame, *tensors), {})
        records = _untangled(traced)
    except CutError:
        return None
    if any(entry.state or entry.draws for entry in records.values()) or _writes_buffers(traced, records):
        return None
    _place_nodes(traced.module)
    num_answers = traced.out_spec.num_leaves - len(tensors)
    moving = frozenset(f"{ROOT}.{path}" for path in found.moving) | found.moving  # paths of globals begin as they do
    parts = Parts(traced, module, records, False, moving, found.keeps_weights, fixed=found.fixed)
    forbidden = alias.forbidden_cuts(traced.module.graph, records) | _inside_states(traced, num_answers)
    return Segment(parts, len(tensors), lambda: _tensors(init()), frozenset(forbidden), num_answers, records)


def _tensors(states: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tuple(states)) if isinstance(leaf, Tensor)]


def _untangled(traced: Traced) -> dict[fx.Node, NodeRecord]:
    graph = traced.module.graph
    alias.place_items(graph)
    records = record(traced.module, traced.leaves)
    if alias.copy_written_inputs(graph, records):
        records = record(traced.module, traced.leaves)
    if alias.copy_before_writes(graph, records):
        records = record(traced.module, traced.leaves)
    return records


def _place_nodes(module: fx.GraphModule) -> None:
    """Nodes of a layer's own arithmetic, which is called by no module, belong to the layer whose weights they read, or
    else to where the node before them belongs."""
    nodes = alias.call_nodes(module.graph)
    places = [module_path(node) or _owner_of_weights(node) for node in nodes]
    path = next(filter(None, places), "")
    for node, place in zip(nodes, places):
        path = place or path
        if not module_path(node) and path:
            node.meta["nn_module_stack"] = {path: (path, "")}


def _owner_of_weights(node: fx.Node) -> str:
    read = [str(n.target).rpartition(".")[0] for n in node.all_input_nodes if n.op == "get_attr"]
    return next((name for name in read if name.startswith(f"{ROOT}.")), "")


def _writes_buffers(traced: Traced, records: Mapping[fx.Node, NodeRecord]) -> bool:
    written = {storage for entry in records.values() for storage in entry.writes}
    return any(records[n].storages & written for n in traced.module.graph.find_nodes(op="get_attr") if n in records)


def _inside_states(traced: Traced, num_answers: int) -> set[int]:
    """Boundaries that would part who reads a state from who makes its next value."""
    graph = traced.module.graph
    position = {node: n for n, node in enumerate(alias.call_nodes(graph))}
    states = graph.find_nodes(op="placeholder")[1:]
    after = graph.find_nodes(op="output")[0].args[0][num_answers:]
    forbidden: set[int] = set()
    for state, made in zip(states, after, strict=True):
        places = [position[n] for n in (*state.users, made) if n in position]
        forbidden |= set(range(min(places, default=0) + 1, max(places, default=0) + 1))
    return forbidden


@dataclass(frozen=True, eq=False)
class PieceStep:
    """``step`` of a piece of a segment: the graph's, with the tensors of the state among its inputs and outputs."""

    inner: Callable[[Values, State], tuple[Values, State]]
    given: tuple[int, ...]
    """Which inputs of the graph are the stage's; the others are its state, in order."""
    held: tuple[int, ...]
    handed_on: tuple[int, ...]
    """Which outputs of the graph are the stage's."""
    kept: tuple[int, ...]
    """Which are the next state: where below 0, the input ``-1 - n`` itself."""

    def __call__(self, inputs: Values, state: State) -> tuple[Values, State]:
        return self._run(self.inner, inputs, state)

    def on_module(self, module: nn.Module) -> PieceStep:
        """The same step by the graph as a module, which an exporter can look into."""
        return replace(self, inner=_ModuleStep(module))

    def with_gradients(self, inputs: Values, state: State) -> tuple[Values, State]:
        """The same step in whatever gradient mode it is called in: what training calls."""
        return self._run(self.inner.with_gradients, inputs, state)  # type: ignore[attr-defined]

    def _run(self, step: Any, inputs: Values, state: State) -> tuple[Values, State]:
        if any(value is NOTHING for value in inputs):
            return (NOTHING,) * len(self.handed_on), state
        full: list[Any] = [None] * (len(self.given) + len(self.held))
        for n, value in zip(self.given, inputs):
            full[n] = value
        for n, value in zip(self.held, state or ()):
            full[n] = value
        made, _ = step(tuple(full), None)
        after = tuple(made[n] if n >= 0 else full[-1 - n] for n in self.kept)
        return tuple(made[n] for n in self.handed_on), after if self.held else state


@dataclass(frozen=True, eq=False)
class _ModuleStep:
    module: nn.Module

    def __call__(self, inputs: Values, state: State) -> tuple[Values, State]:
        return self.module(*inputs), state

    with_gradients = __call__


def _with_states(segment: Segment, stages: Stages) -> Stages:
    """Stages over (frame, states) as stages over the frame, each with its own part of the states."""
    K, first_output = len(stages), segment.num_answers
    reader = {k.output - 1: k for k in stages.links if k.source == SOURCE and k.output >= 1 and k.target <= K}
    maker = {k.input - first_output: k for k in stages.links if k.target == K + 1 and k.input >= first_output}
    where_in: dict[tuple[int, int], int] = {}
    where_out: dict[tuple[int, int], int] = {}
    result = []
    for number, stage in enumerate(stages, start=1):
        own = [n for n in range(segment.num_states) if n in reader and reader[n].target == number]
        held = tuple(reader[n].input for n in own)
        kept = []
        for n in own:
            link = maker[n]
            if link.source == SOURCE:  # the next value is an input as it is: a state's old value, or the frame
                own_links = [k for k in stages.links if k.target == number and k.source == SOURCE]
                same = [k.input for k in own_links if k.output == link.output]
                if not same:
                    raise CutError(f"the next value of state {n} is not known in stage {number}")
                kept.append(-1 - same[0])
            elif link.source != number:
                raise CutError(f"state {n} is read in stage {number} and made in stage {link.source}")
            else:
                kept.append(link.output)
        given = tuple(n for n in range(stage.num_inputs) if n not in held)
        read = {
            k.output for k in stages.links if k.source == number and not (k.target == K + 1 and k.input >= first_output)
        }
        handed_on = tuple(n for n in range(stage.num_outputs) if n in read)
        where_in |= {(number, n): m for m, n in enumerate(given)}
        where_out |= {(number, n): m for m, n in enumerate(handed_on)}
        result.append(_piece(segment, stage, own, PieceStep(stage.step, given, held, handed_on, tuple(kept))))
    links = []
    for k in stages.links:
        if (k.source == SOURCE and k.output >= 1) or (k.target == K + 1 and k.input >= first_output):
            continue
        output = 0 if k.source == SOURCE else where_out[k.source, k.output]
        links.append(Link(k.source, output, k.target, k.input if k.target == K + 1 else where_in[k.target, k.input]))
    in_spec = pytree.tree_structure(((segment.parts.traced.leaves[0],), {}))
    answer = pytree.tree_unflatten(list(range(stages.out_spec.num_leaves)), stages.out_spec)[0]
    return Stages(tuple(result), tuple(links), in_spec, pytree.tree_structure(answer))


def _piece(segment: Segment, stage: Stage, own: list[int], step: PieceStep) -> Stage:
    def init_state() -> State:
        states = segment.init_states()
        return tuple(states[n] for n in own)

    return replace(
        stage,
        name=stage.name.replace(f"{ROOT}.", ""),
        step=step,
        num_inputs=len(step.given),
        num_outputs=len(step.handed_on),
        init_state=init_state if own else None,
    )


def tried(stages: Stages, frame: Tensor) -> Stages:
    """The stages with what each was given and the sizes of what it made, in a step on ``frame``."""
    values: dict[tuple[int, int], Any] = {(SOURCE, 0): frame}
    result = []
    for number, stage in enumerate(stages, start=1):
        inputs = stages.inputs_of(values, number)
        made, _ = stage.step(inputs, None if stage.init_state is None else stage.init_state())
        values |= {(number, n): value for n, value in enumerate(made)}
        result.append(replace(stage, example_inputs=inputs, output_bytes=tuple(num_bytes(v) for v in made)))
    return stages.with_stages(tuple(result))
