"""The stages of a graph that is ready to be divided, made and compared with the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from sidestream.circuit import alias
from sidestream.circuit.autocast_check import AutocastCheck
from sidestream.circuit.calls import Stream
from sidestream.circuit.difference import first_difference
from sidestream.circuit.freshness import guard_of
from sidestream.circuit.hidden import Watched
from sidestream.circuit.measure import NodeRecord, hidden_buffers, num_bytes, own_copies, storage_of
from sidestream.circuit.split import Piece, module_path, module_paths, piece_module, piece_name, split
from sidestream.circuit.stage import NOTHING, SOURCE, Stage, Stages, flatten_inputs
from sidestream.circuit.step import Check, graph_step
from sidestream.circuit.trace import Traced
from sidestream.circuit.verify import Verifier
from sidestream.errors import CutError


@dataclass(frozen=True)
class Parts:
    """A graph that is ready to be divided, and what its nodes do."""

    traced: Traced
    model: nn.Module
    records: Mapping[fx.Node, NodeRecord]
    steers_gradients: bool
    moving: frozenset[str] = frozenset()
    """Attributes that forward itself assigns."""
    keeps_weights: bool = False
    """Forward keeps what it computed from the weights in its first call."""
    aliases: Mapping[int, str] = field(default_factory=dict)
    """Registered buffers (by identity) that an attribute names too, and that name."""
    fixed: tuple[tuple[str, Any, Any], ...] = ()
    """Plain values of globals and classes that the model's code reads: path, table, key."""

    def stages(
        self, boundaries: Sequence[int], seconds: Sequence[float] | None, weights: Sequence[float] | None = None
    ) -> Stages:
        """The stages that begin at ``boundaries``. ``seconds``, ``weights``: of each node."""
        traced = self.traced
        pieces, links = split(traced.module, boundaries)
        leaves = dict(zip(traced.module.graph.find_nodes(op="placeholder"), traced.leaves))
        stages = []
        for number, (piece, start) in enumerate(zip(pieces, [0, *boundaries]), start=1):
            own = slice(start, start + len(piece.nodes))
            stage = self._stage(number, piece, leaves, None if seconds is None else sum(seconds[own]))
            stages.append(replace(stage, unit_costs=None if weights is None else tuple(weights[own])))
        return Stages(tuple(stages), tuple(links), traced.in_spec, traced.out_spec)

    def _stage(self, number: int, piece: Piece, leaves: Mapping[fx.Node, Any], cost_seconds: float | None) -> Stage:
        module = piece_module(self.traced.module, piece, f"Stage{number}", copied_out=self._in_buffers)
        written = {str(n.target) for node in piece.nodes for n in node.all_input_nodes if n in self._written_buffers}
        held = [b for node in piece.nodes if node.op == "call_module" for b in self._held(node)]
        step = graph_step(
            module,
            _checks(piece, leaves),
            written=tuple(written),
            held=list(dict.fromkeys(held)),
            no_gradients=_NO_GRADIENTS.format(type(self.model).__name__) if self.steers_gradients else "",
        )
        return Stage(
            name=piece_name(piece),
            step=step,
            num_inputs=len(piece.inputs),
            num_outputs=len(piece.outputs),
            cost_seconds=cost_seconds,
            hides_state=step.has_buffers,
            init_buffers=step.init_buffers if step.has_buffers else None,
            calls_modules=any(node.op == "call_module" for node in piece.nodes),
            draws=any(self.records[node].draws for node in piece.nodes),
            module=module,
            guard=guard_of(
                self.model,
                step,
                {"", *(path for node in piece.nodes for path in module_paths(node))},
                self.moving,
                [self.traced.module.get_submodule(str(n.target)) for n in piece.nodes if n.op == "call_module"],
                self.fixed,
                keeps_weights=self.keeps_weights,
            ),
        )

    @cached_property
    def _written_buffers(self) -> set[fx.Node]:
        """The nodes that fetch a buffer that is written, or that shares memory with one."""
        written = {storage for entry in self.records.values() for storage in entry.writes}
        fetched = self.traced.module.graph.find_nodes(op="get_attr")
        return {node for node in fetched if node in self.records and self.records[node].storages & written}

    @cached_property
    def _in_buffers(self) -> set[fx.Node]:
        return alias.in_buffers(self.traced.module.graph, self.records)

    def _held(self, node: fx.Node) -> list[tuple[nn.Module, str]]:
        held = hidden_buffers(self.traced.module.get_submodule(str(node.target)))
        for module, name in held:
            if (other := self.aliases.get(id(module._buffers[name]))) is not None:
                raise CutError(
                    f"the buffer {name!r} of {type(module).__name__}, which is kept whole, is also the attribute "
                    f"{other!r}, so a run cannot have its own; keep one name for it, the buffer's"
                )
        return held

    def verified(self, result: Stages, boundaries: Sequence[int], verifier: Verifier) -> Stages:
        """The stages, compared with the model, and with what each was given and made on the example."""
        numbers = {}
        for number, piece in enumerate(split(self.traced.module, boundaries)[0], start=1):
            numbers.update(dict.fromkeys(piece.nodes, number))

        def where(probe: Any) -> str:
            node = first_difference(self.model, self.traced.module, probe)
            if node is None or node not in numbers:
                return "code outside of its submodules, or a later frame"
            stack = (node.meta.get("stack_trace") or "").strip().splitlines()
            line = f", {stack[-1].strip()}" if stack else ""
            number = numbers[node]
            return f"stage {number} ({result[number - 1].name}), module {module_path(node)!r} (node {node.name}{line})"

        self._check_buffers(result, verifier)
        seen: list[_Values] = []
        verifier.compare(lambda probes: _run_in_a_row(result, probes, self.model.training, seen), where)
        verifier.before.restore()
        values = seen[1] if len(seen) > 1 else _tried(result, self.traced.leaves)  # of the example
        stages = [
            replace(
                stage,
                example_inputs=tuple(own_copies(result.inputs_of(values, number))),
                output_bytes=tuple(num_bytes(values[number, n]) for n in range(stage.num_outputs)),
            )
            for number, stage in enumerate(result, start=1)
        ]
        result = result.with_stages(tuple(stages))
        is_training = self.model.training
        check = AutocastCheck(
            self.model, lambda probes: _run_in_a_row(result, probes, is_training), verifier.probes, stages[0].guard
        )
        return result.with_stages((replace(stages[0], guard=check), *stages[1:]))

    def _check_buffers(self, stages: Stages, verifier: Verifier) -> None:
        """CutError for a buffer that the model writes and no stage has as its state."""
        shown = {memory for stage in stages for memory in stage.step.memories()}  # type: ignore[attr-defined]
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        for name in verifier.written_buffers:
            if name in buffers and storage_of(buffers[name]) not in shown:
                raise CutError(
                    f"{type(self.model).__name__} writes to the buffer {name!r} from a module that does not own it, or "
                    "in a way that the graph does not show; write to it in the module that owns it"
                )


_NO_GRADIENTS = (
    "{} turns gradients on or off inside (torch.no_grad), and was cut in eval mode, where that leaves no trace; "
    "call train() before the cut to train it"
)


def verified_stream(stages: Stages, verifier: Verifier) -> Stages:
    """The stages of a Chain, compared with it; what its layers keep in buffers is declared."""
    watched = [Watched(stage) for stage in stages]
    watching = stages.with_stages(tuple(w.watching() for w in watched))
    is_training = verifier.model.training
    verifier.compare(lambda probes: _run_in_a_row(watching, probes, is_training), lambda probe: "an unknown stage")
    declared = stages.with_stages(tuple(w.declared() for w in watched))
    if all(stage.guard is None for stage in declared):  # its layers run as they are, in any mode
        return declared
    check = AutocastCheck(
        verifier.model,
        lambda probes: _run_in_a_row(declared, probes, is_training),
        verifier.probes,
        declared[0].guard,
        lambda: Stream(verifier.stream.layer),  # type: ignore[union-attr]
    )
    return declared.with_stages((replace(declared[0], guard=check), *declared.stages[1:]))


_Values = dict[tuple[int, int], Any]
"""By stage and output."""


def _run_in_a_row(
    stages: Stages, probes: Sequence[Any], is_training: bool, frames: list[_Values] | None = None
) -> Iterator[Any]:
    """The answers to one probe after the other, the stages interleaved as in a pipeline, each on another frame.

    ``frames``: where to put what was on the wires, probe by probe.
    """
    frames = [] if frames is None else frames
    K, state = len(stages), stages.init_state()
    steps = [getattr(s.step, "with_gradients", s.step) if is_training else s.step for s in stages]
    with torch.inference_mode(not is_training):
        for args, kwargs in probes:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            own_args, own_kwargs = pytree.tree_unflatten(own_copies(leaves), spec)
            given = flatten_inputs(stages.in_spec, own_args, own_kwargs, stages.example)
            frames.append({(SOURCE, n): leaf for n, leaf in enumerate(given)})
        for tick in range(len(frames) + K - 1):
            for number in range(min(K, tick + 1), max(0, tick - len(frames) + 1), -1):
                values = frames[tick - number + 1]
                outputs, state[number - 1] = steps[number - 1](stages.inputs_of(values, number), state[number - 1])
                values.update({(number, n): value for n, value in enumerate(outputs)})
    for values in frames:
        answer = stages.inputs_of(values, K + 1)
        is_nothing = any(leaf is NOTHING for leaf in answer)
        yield NOTHING if is_nothing else pytree.tree_unflatten(answer, stages.out_spec)


def _tried(stages: Stages, leaves: Sequence[Any]) -> _Values:
    """What the source and every stage give on the example."""
    state = stages.init_state()
    values: _Values = {(SOURCE, n): leaf for n, leaf in enumerate(own_copies(leaves))}
    for number, stage in enumerate(stages, start=1):
        outputs, _ = stage.step(stages.inputs_of(values, number), state[number - 1])
        values.update({(number, n): value for n, value in enumerate(outputs)})
    return values


def _checks(piece: Piece, leaves: Mapping[fx.Node, Any]) -> tuple[Check, ...]:
    return tuple(
        (index, node.name, leaves[node].shape, leaves[node].dtype)
        for index, node in enumerate(piece.inputs)
        if isinstance(leaves.get(node), torch.Tensor)
    )
