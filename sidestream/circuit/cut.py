"""Cut any model by depth: trace it, weigh its nodes, choose the boundaries, make the stages.

    stages = cut(model, frame_BCHW, num_stages=4)                 # balanced by measured cost
    stages = cut(model, frame_BCHW, cut=("layer2", "layer3"))     # new stages begin at these modules

Stages in a row equal the model, to the bit; before they are given out they are compared with it (``verify``), and
what differs is refused. Parameters are shared with the model, not copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from sidestream.circuit import alias
from sidestream.circuit.balance import balanced
from sidestream.circuit.calls import Found, Stream, check_of
from sidestream.circuit.gate import GATE, ONE_CUT
from sidestream.circuit.inference_tensors import usual_tensors
from sidestream.circuit.measure import Costs, NodeRecord, own_copies, record, weigh
from sidestream.circuit.memory import Snapshot, kept
from sidestream.circuit.names import check_allowed, named_boundaries
from sidestream.circuit.parts import Parts, verified_stream
from sidestream.circuit.split import crossing_bytes
from sidestream.circuit.stage import Stages
from sidestream.circuit.streaming import check_frame, cut_chain
from sidestream.circuit.trace import Traced, plain_model, trace_around, trace_exported
from sidestream.circuit.verify import Verifier
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
    check: str = "full",
) -> Stages:
    """``model`` in stages that are balanced by cost, or that begin at the modules named in ``cut``.

    ``example``: what the model is called with in the stream, batch of 1 included. A dict is its keyword arguments,
    a tuple its positional arguments, anything else its only argument (a model whose only argument is itself a dict
    or a tuple takes ``(that,)``). The stages accept these shapes and types only. Default: one batch of the size that
    the model wants, where it was made by name.
    ``num_stages``: a number, or "auto" for as many as keep ``num_workers`` (default: the machine's processors) busy.
    ``cut``: dotted names of modules in the order in which they run; a stage begins at the first operation of each.
    ``input_spec``: what ``run`` prepares frames with; default: the model's own, where it was made by name.
    ``costs``: "measured" (seconds on one thread), "parameters", "flops", "uniform", or one number per node (of a
    ``Chain``: per layer, or per node and layer kept whole).
    ``check``: how the stages are compared with the model: "full" (three frames in a row that are not the example's,
    four runs of the model, up to eight where it changes attributes, three of the stages), "once" (one frame), "off".

    The model is taken in the mode it is in (call ``eval()`` first to stream it). For a ``Chain`` of streaming layers
    ``example`` is one frame; it is cut between its layers and, in eval mode, inside of those that work alike in every
    tick (encoders, residual bodies, the clip model behind a sliding window); each state stays in one stage.
    Raises CutError for what cannot be cut as asked; stages that are fed other shapes or types than the example's raise
    LayoutError. The model, its buffers and attributes, and the random generators are afterwards as they were.
    """
    info = info_of(model)
    model, how = plain_model(model), check_of(check)
    args, kwargs = example_call(blank_input(info.input_spec) if example is None and info else example)
    names = None if cut is None else ((cut,) if isinstance(cut, str) else tuple(cut))
    _check_count(num_stages, names)
    num_workers = num_workers or num_cores()
    title = name or (info.name.rpartition("/")[2] if info else type(model).__name__)
    input_spec = input_spec or (info.input_spec if info else None)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    own_args, own_kwargs = pytree.tree_unflatten(
        own_copies(leaves), spec
    )  # arguments that are one tensor are told apart
    with ONE_CUT, torch.inference_mode(False), usual_tensors(model) as replaced, kept(model) as before:
        if isinstance(model, Chain):
            verifier = Verifier(model, own_args, own_kwargs, before, how, stream=Stream(model))
            check_frame(own_args, own_kwargs)
            verifier.look()
            stages = cut_chain(
                model,
                own_args,
                own_kwargs,
                names=names,
                num_stages=num_stages,
                costs=costs,
                num_workers=num_workers,
                found=Found(verifier.moving, verifier.keeps_weights, tuple(verifier.before.fixed)),
            )
            result = verified_stream(stages, verifier)
        else:
            verifier = Verifier(model, own_args, own_kwargs, before, how)
            result = _cut_graph(verifier, names, (num_stages, costs, num_workers))
    if replaced:  # by the model's own again
        result.init_state()
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


def _check_count(num_stages: int | str, names: tuple[str, ...] | None) -> None:
    if num_stages != "auto" and not (type(num_stages) is int and num_stages >= 1):
        raise CutError(f'{num_stages = } is not a number of stages; give a whole number from 1 on, or "auto"')
    if names is not None and num_stages not in ("auto", len(names) + 1):
        raise CutError(
            f"{len(names)} names in cut=... make {len(names) + 1} stages, but {num_stages = }; leave one of the two out"
        )


def _cut_graph(verifier: Verifier, names: tuple[str, ...] | None, wanted: tuple[int | str, Costs, int]) -> Stages:
    """Any model but a Chain; ``wanted``: number of stages, costs, number of workers."""
    num_stages, costs, num_workers = wanted
    model = verifier.model
    verifier.look()
    traced = _traced(verifier, names)
    _check_answer(traced, model)
    records = _untangled(traced, model, names)
    graph, weights = traced.module.graph, weigh(traced.module, traced.leaves, costs)
    forbidden = alias.forbidden_cuts(graph, records)
    if names is None:
        crossings = crossing_bytes(graph, records, graph.find_nodes(op="placeholder"))
        boundaries = balanced(weights, crossings, num_stages, num_workers=num_workers, forbidden=forbidden)
    else:
        boundaries = named_boundaries(graph, model, names)
        check_allowed(names, boundaries, forbidden)
    before, is_kept = verifier.before, verifier.keeps_weights
    steers, moving = verifier.steers_gradients, verifier.moving
    parts = Parts(traced, model, records, steers, moving, is_kept, before.aliases, tuple(before.fixed))
    stages = parts.stages(boundaries, weights if costs == "measured" else None, weights)
    return parts.verified(stages, boundaries, verifier)


def _check_answer(traced: Traced, model: nn.Module) -> None:
    if traced.out_spec.num_leaves == 0:
        raise CutError(f"{type(model).__name__} answers with nothing on the example; let it return a tensor at least")


def _traced(verifier: Verifier, names: tuple[str, ...] | None) -> Traced:
    """The graph of the model, around modules that stay opaque where ``names`` are given and it cannot be had else."""
    model, args, kwargs = verifier.model, verifier.args, verifier.kwargs
    at_start = Snapshot(model)
    verifier.ready_to_trace()
    with GATE.tracing():
        try:
            return trace_exported(model, args, kwargs)
        except CutError:
            if names is None:
                raise
            at_start.restore()
            verifier.ready_to_trace()
            return trace_around(model, args, kwargs, names)
        finally:
            at_start.forget_new_cache_entries()
            at_start.restore()


def _untangled(traced: Traced, model: nn.Module, names: tuple[str, ...] | None) -> dict[fx.Node, NodeRecord]:
    """Make the graph fit for cutting (no in-place change of an input, few that reach far); what its nodes do then."""
    module, graph = traced.module, traced.module.graph
    alias.place_items(graph)
    records = record(module, traced.leaves)
    if alias.copy_written_inputs(graph, records):
        records = record(module, traced.leaves)
    wanted = named_boundaries(graph, model, names) if names else ()
    alias.settle_assignments(graph, records)
    changed = alias.copy_before_writes(graph, records, wanted)
    if alias.copy_answers(graph, records) or changed:
        records = record(module, traced.leaves)
    return records
