"""Cut any model by depth: trace it, weigh its nodes, choose the boundaries, make the stages.

    stages = cut(model, frame_BCHW, num_stages=4)                 # balanced by measured cost
    stages = cut(model, frame_BCHW, cut=("layer2", "layer3"))     # new stages begin at these modules

Stages in a row equal the model, to the bit. Parameters are shared with the model, not copied.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from sidestream.circuit import alias
from sidestream.circuit.balance import balanced
from sidestream.circuit.measure import Costs, NodeRecord, num_bytes, own_copies, record, undisturbed, weigh
from sidestream.circuit.names import check_allowed, named_boundaries
from sidestream.circuit.slice import slice_chain
from sidestream.circuit.split import Piece, piece_module, piece_name, split
from sidestream.circuit.stage import Stage, Stages
from sidestream.circuit.step import Check, graph_step
from sidestream.circuit.trace import Traced, trace_around, trace_exported
from sidestream.errors import CutError
from sidestream.models.info import info_of
from sidestream.nn.combine import Chain
from sidestream.report.measure import num_cores
from sidestream.types import InputSpec


def cut(
    model: nn.Module,
    example: Any = None,
    *,
    num_stages: int | str = "auto",
    cut: Sequence[str] | None = None,
    costs: Costs = "measured",
    name: str | None = None,
    input_spec: Any = None,
    num_workers: int | None = None,
) -> Stages:
    """``model`` in stages that are balanced by cost, or that begin at the modules named in ``cut``.

    ``example``: what the model is called with in the stream, batch of 1 included. A dict is its keyword arguments,
    a tuple its positional arguments, anything else its only argument (a model whose only argument is itself a dict
    or a tuple takes ``(that,)``). The stages accept these shapes and types only. Default: one batch of the size that
    the model wants, where it was made by name.
    ``num_stages``: a number, or "auto" for as many as keep ``num_workers`` (default: the machine's processors) busy.
    ``cut``: dotted names of modules in the order in which they run; a stage begins at the first operation of each.
    ``input_spec``: what ``run`` prepares frames with; default: the model's own, where it was made by name.
    ``costs``: "measured" (seconds on one thread), "parameters", "flops", "uniform", or one number per node.

    The model is taken in the mode it is in (call ``eval()`` first to stream it). A ``Chain`` of streaming layers is
    cut between its layers, and ``example`` is one frame. Raises CutError for what cannot be cut as asked; stages
    that are fed other shapes or types than the example's raise LayoutError.
    """
    info = info_of(model)
    args, kwargs = example_call(blank_input(info.input_spec) if example is None and info else example)
    names = None if cut is None else ((cut,) if isinstance(cut, str) else tuple(cut))
    _check_count(num_stages, names)
    num_workers = num_workers or num_cores()
    title = name or (info.name.rpartition("/")[2] if info else type(model).__name__)
    input_spec = input_spec or (info.input_spec if info else None)
    with torch.inference_mode(False):  # tracing and recording need tensors that count their changes
        args, kwargs = pytree.tree_map(lambda x: x.clone() if _is_inference(x) else x, (args, kwargs))
        if isinstance(model, Chain):
            stages, links, in_spec, out_spec = slice_chain(
                model, args, kwargs, names=names, num_stages=num_stages, costs=costs, num_workers=num_workers
            )
            result = Stages(stages, links, in_spec, out_spec)
        else:
            result = _cut_graph(model, args, kwargs, names, (num_stages, costs, num_workers))
    return replace(result, name=title, input_spec=input_spec, example=(args, kwargs))


def blank_input(spec: InputSpec) -> torch.Tensor:
    """Something of the shape that a model wants: ``frame_BCHW`` or ``clip_BTCHW``, seeded noise, batch of 1."""
    frames = (spec.num_frames,) if spec.layout == "BTCHW" else ()
    return torch.rand(1, *frames, 3, *spec.size_px, generator=torch.Generator().manual_seed(0))


def example_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of an example: a dict is keyword arguments, a tuple positional ones, else the only one."""
    if example is None:
        raise CutError("the model does not say what it wants to be fed; give an example: cut(model, frame_BCHW)")
    if isinstance(example, dict):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def _is_inference(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_inference()


def _check_count(num_stages: int | str, names: tuple[str, ...] | None) -> None:
    if num_stages != "auto" and not (type(num_stages) is int and num_stages >= 1):
        raise CutError(f'{num_stages = } is not a number of stages; give a whole number from 1 on, or "auto"')
    if names is not None and num_stages not in ("auto", len(names) + 1):
        raise CutError(
            f"{len(names)} names in cut=... make {len(names) + 1} stages, but {num_stages = }; leave one of the two out"
        )


def _cut_graph(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: tuple[str, ...] | None,
    wanted: tuple[int | str, Costs, int],
) -> Stages:
    """Any model but a Chain; ``wanted``: number of stages, costs, number of workers."""
    num_stages, costs, num_workers = wanted
    traced, is_opaque = _traced(model, args, kwargs, names)
    records = _untangled(traced, model, names)
    graph, weights = traced.module.graph, weigh(traced.module, traced.leaves, costs)
    forbidden = alias.forbidden_cuts(graph, records)
    if names is None:
        crossings = _crossing_bytes(graph, records)
        boundaries = balanced(weights, crossings, num_stages, num_workers=num_workers, forbidden=forbidden)
    else:
        boundaries = named_boundaries(graph, model, names)
        check_allowed(names, boundaries, forbidden)
    hidden = {w.node for w in alias.writes(graph, records) if any(n.op == "get_attr" for n in w.members)}
    result = _stages(traced, boundaries, weights if costs == "measured" else None, hidden)
    if is_opaque:
        _check_equal(model, result, args, kwargs)
    return result


def _traced(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...] | None
) -> tuple[Traced, bool]:
    """The graph of the model, and whether some of its modules were kept opaque to get it."""
    try:
        return trace_exported(model, args, kwargs), False
    except CutError:
        if names is None:
            raise
    return trace_around(model, args, kwargs, names), True


def _untangled(traced: Traced, model: nn.Module, names: tuple[str, ...] | None) -> dict[fx.Node, NodeRecord]:
    """Make the graph fit for cutting (no in-place change of an input, few that reach far); what its nodes do then."""
    module, graph = traced.module, traced.module.graph
    alias.place_items(graph)
    records = record(module, traced.leaves)
    if alias.copy_written_inputs(graph, records):
        records = record(module, traced.leaves)
    wanted = named_boundaries(graph, model, names) if names else ()
    if alias.copy_before_writes(graph, records, wanted):
        records = record(module, traced.leaves)
    return records


def _crossing_bytes(graph: fx.Graph, records: Mapping[fx.Node, NodeRecord]) -> list[float]:
    """Bytes that a cut before each call node would carry: all that is made before it and read from there on."""
    calls = alias.call_nodes(graph)
    position = {node: n for n, node in enumerate(calls)} | {graph.find_nodes(op="output")[0]: len(calls)}
    change = [0] * (len(calls) + 2)
    for node in [*graph.find_nodes(op="placeholder"), *calls]:
        last = max((position[user] for user in node.users), default=-1)
        first = position.get(node, -1) + 1
        if last >= first:
            change[first] += records[node].num_bytes
            change[last + 1] -= records[node].num_bytes
    return [float(total) for total in accumulate(change[: len(calls)])]


def _stages(
    traced: Traced, boundaries: Sequence[int], seconds: Sequence[float] | None, hidden: Collection[fx.Node]
) -> Stages:
    """The stages, with what they were given and made on the example; ``hidden``: nodes that write to buffers."""
    pieces, links = split(traced.module, boundaries)
    leaves = dict(zip(traced.module.graph.find_nodes(op="placeholder"), traced.leaves))
    values: dict[Any, Any] = dict(leaves)
    stages, starts = [], [0, *boundaries]
    for number, (piece, start) in enumerate(zip(pieces, starts), start=1):
        module = piece_module(traced.module, piece, f"Stage{number}")
        inputs = tuple(values[node] for node in piece.inputs)
        step = graph_step(module, _checks(piece, leaves))
        with undisturbed(module):
            outputs, _ = step(inputs, None)
        values.update((node, value) for node, value in zip(piece.outputs, outputs) if isinstance(node, fx.Node))
        stages.append(
            Stage(
                name=piece_name(piece),
                step=step,
                num_inputs=len(inputs),
                num_outputs=len(outputs),
                cost_seconds=None if seconds is None else sum(seconds[start : start + len(piece.nodes)]),
                output_bytes=tuple(num_bytes(value) for value in outputs),
                hides_state=any(node in hidden for node in piece.nodes),
                module=module,
                example_inputs=inputs,
            )
        )
    return Stages(tuple(stages), tuple(links), traced.in_spec, traced.out_spec)


def _checks(piece: Piece, leaves: Mapping[fx.Node, Any]) -> tuple[Check, ...]:
    return tuple(
        (index, node.name, leaves[node].shape, leaves[node].dtype)
        for index, node in enumerate(piece.inputs)
        if isinstance(leaves.get(node), torch.Tensor)
    )


def _check_equal(model: nn.Module, stages: Stages, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A graph around opaque modules must give what the model gives; CutError when it does not."""
    with undisturbed(model), torch.no_grad():
        expected = pytree.tree_leaves(model(*own_copies(args), **kwargs))
    with undisturbed(model):
        given = pytree.tree_leaves(stages(*args, **kwargs))
    if not all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(given, expected)):
        raise CutError(
            "the graph around the opaque modules does not give what the model gives, probably because code outside "
            "of its submodules depends on values; move that code into a submodule of its own"
        )
