"""Modules that the graph keeps whole: those of torch.nn that run another kernel in inference than under tracing.

``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` take a fused path when no gradient is asked for, and
the ordinary one while they are traced; the two differ in the last bits. Kept as one node, they decide at run time,
as in the model itself, and still open up when a stage is exported or compiled. So do subclasses of theirs, whatever
they answer, and an encoder or decoder of torch's that is given a mask (it looks at the values, or nests tensors).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sidestream.errors import CutError

KEPT_WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.TransformerDecoder)
_STACKS = (nn.TransformerEncoder, nn.TransformerDecoder)


@dataclass
class Call:
    """One call of a module that is kept whole, noted while the model is traced."""

    path: str
    module: nn.Module
    forward: Any
    in_spec: pytree.TreeSpec
    leaves: list[Any]
    """Arguments, with each tensor replaced by its number."""
    out_places: list[tuple[Any, ...]] = field(default_factory=list)
    """Where in the answer each of its tensors stands: what to index with, one after the other; () for the answer."""
    out_leaves: list[Any] = field(default_factory=list)
    """What the answer holds besides tensors (``_TENSOR`` at the place of a tensor)."""
    out_spec: Any = None


_CALLS: dict[str, Call] = {}
_TENSOR = object()


@torch.library.custom_op("sidestream::kept_whole", mutates_args=())
def kept_whole(tensors: list[Tensor], key: str) -> list[Tensor]:
    """Stands for a call in the traced graph; never run."""
    raise NotImplementedError(key)


@kept_whole.register_fake
def _(tensors: list[Tensor], key: str) -> list[Tensor]:
    call = _CALLS[key]
    leaves = [tensors[leaf.number] if isinstance(leaf, _Place) else leaf for leaf in call.leaves]
    args, kwargs = pytree.tree_unflatten(leaves, call.in_spec)
    if isinstance(call.module, _STACKS):  # it looks at its mask, of which there are no values here
        answer = torch.empty_like(args[0] if args else kwargs["tgt" if "tgt" in kwargs else "src"])
    else:
        answer = call.forward(*args, **kwargs)
    found, call.out_spec = pytree.tree_flatten_with_path(answer)
    call.out_places = [_steps(path) for path, value in found if isinstance(value, Tensor)]
    call.out_leaves = [_TENSOR if isinstance(value, Tensor) else value for _, value in found]
    return [value for _, value in found if isinstance(value, Tensor)]


@dataclass(frozen=True)
class _Place:
    number: int


@contextmanager
def keeping_whole(model: nn.Module) -> Iterator[dict[str, Call]]:
    """While inside, calls of such modules (in eval mode) are traced as one node each; the calls are noted by key."""
    calls: dict[str, Call] = {}
    found = {path: m for path, m in model.named_modules() if path and isinstance(m, KEPT_WHOLE) and not m.training}
    encoders = [p for p, m in found.items() if isinstance(m, _STACKS)]  # whole only with a mask
    others = [p for p in found if p not in encoders]
    found = {p: m for p, m in found.items() if not any(p.startswith(f"{outer}.") for outer in others)}
    found = {p: m for p, m in found.items() if "forward" not in vars(m)}  # the user's own patch stays
    for path, module in found.items():
        module.forward = _noted(path, module, calls)  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        for module in found.values():
            del module.forward
        for key in calls:
            _CALLS.pop(key, None)


def restore_calls(root: fx.GraphModule, calls: dict[str, Call]) -> None:
    """Put the modules themselves where the traced graph has stand-ins."""
    graph = root.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.sidestream.kept_whole.default):
        tensors, key = node.args
        call = calls[key]
        root.set_submodule(call.path, call.module)
        leaves = [tensors[leaf.number] if isinstance(leaf, _Place) else leaf for leaf in call.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, call.in_spec)
        with graph.inserting_before(node):
            whole = graph.call_module(call.path, tuple(args), kwargs)
            whole.meta = {k: v for k, v in node.meta.items() if k != "val"}
        for item in list(node.users):
            _put_item(graph, whole, call.out_places[item.args[1]], item)
        graph.erase_node(node)


def _put_item(graph: fx.Graph, whole: fx.Node, place: tuple[Any, ...], item: fx.Node) -> None:
    """Replace ``item`` by what stands at ``place`` in the answer of ``whole``."""
    made = whole
    for index in place:
        made.meta["val"] = ()  # marks a node that makes a tuple
        with graph.inserting_before(item):
            made = graph.call_function(operator.getitem, (made, index))
    if made is not whole:
        made.meta = dict(item.meta)
    item.replace_all_uses_with(made)
    graph.erase_node(item)


def _steps(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A path of pytree's as what to index with."""
    steps = []
    for key in path:
        if isinstance(key, pytree.SequenceKey):
            steps.append(key.idx)
        elif isinstance(key, pytree.MappingKey):
            steps.append(key.key)
        else:
            raise CutError(
                f"a module that is kept whole answers with {key}; let it answer with tensors, tuples or dicts"
            )
    return tuple(steps)


def _noted(path: str, module: nn.Module, calls: dict[str, Call]) -> Any:
    forward = type(module).forward.__get__(module)

    def noted(*args: Any, **kwargs: Any) -> Any:
        if isinstance(module, _STACKS) and not _has_mask(module, args, kwargs):
            return forward(*args, **kwargs)
        leaves, in_spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        numbers = iter(range(len(tensors)))
        kept = [_Place(next(numbers)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        key = f"{id(calls)}:{len(calls)}"
        calls[key] = _CALLS[key] = call = Call(path, module, forward, in_spec, kept)
        answers = iter(torch.ops.sidestream.kept_whole(tensors, key))
        filled = [next(answers) if leaf is _TENSOR else leaf for leaf in call.out_leaves]
        return pytree.tree_unflatten(filled, call.out_spec)

    return noted


def _has_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call gives a mask: torch looks at its values, or works on nested tensors then."""
    num_sequences = 1 if isinstance(module, nn.TransformerEncoder) else 2
    masks = [*args[num_sequences:], *(value for name, value in kwargs.items() if name.endswith("mask"))]
    return any(isinstance(mask, Tensor) for mask in masks)
