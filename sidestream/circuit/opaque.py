"""Modules that the graph keeps whole: those of torch.nn that run another kernel in inference than under tracing.

``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` take a fused path when no gradient is asked for, and
the ordinary one while they are traced; the two differ in the last bits. Kept as one node, they decide at run time,
as in the model itself, and still open up when a stage is exported or compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

KEPT_WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass
class Call:
    """One call of a module that is kept whole, noted while the model is traced."""

    path: str
    module: nn.Module
    forward: Any
    in_spec: pytree.TreeSpec
    leaves: list[Any]
    """Arguments, with each tensor replaced by its number."""
    out_index: list[int | None] = field(default_factory=list)
    """Where in the answer each of its tensors stands; [None] when the answer is a tensor."""


_CALLS: dict[str, Call] = {}


@torch.library.custom_op("sidestream::kept_whole", mutates_args=())
def kept_whole(tensors: list[Tensor], key: str) -> list[Tensor]:
    """Stands for a call in the traced graph; never run."""
    raise NotImplementedError(key)


@kept_whole.register_fake
def _(tensors: list[Tensor], key: str) -> list[Tensor]:
    call = _CALLS[key]
    leaves = [tensors[leaf.number] if isinstance(leaf, _Place) else leaf for leaf in call.leaves]
    args, kwargs = pytree.tree_unflatten(leaves, call.in_spec)
    answer = call.forward(*args, **kwargs)
    if isinstance(answer, Tensor):
        call.out_index = [None]
        return [answer]
    call.out_index = [n for n, value in enumerate(answer) if isinstance(value, Tensor)]
    return [answer[n] for n in call.out_index]


@dataclass(frozen=True)
class _Place:
    number: int


@contextmanager
def keeping_whole(model: nn.Module) -> Iterator[dict[str, Call]]:
    """While inside, calls of such modules (in eval mode) are traced as one node each; the calls are noted by key."""
    calls: dict[str, Call] = {}
    found = {path: m for path, m in model.named_modules() if path and isinstance(m, KEPT_WHOLE) and not m.training}
    found = {p: m for p, m in found.items() if not any(p.startswith(f"{outer}.") for outer in found)}
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
            index = call.out_index[item.args[1]]
            if index is None:
                item.replace_all_uses_with(whole)
                graph.erase_node(item)
            else:
                item.args = (whole, index)
                whole.meta["val"] = ()  # marks a node that makes a tuple
        graph.erase_node(node)


def _noted(path: str, module: nn.Module, calls: dict[str, Call]) -> Any:
    forward = type(module).forward.__get__(module)

    def noted(*args: Any, **kwargs: Any) -> Any:
        leaves, in_spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        numbers = iter(range(len(tensors)))
        kept = [_Place(next(numbers)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        key = f"{id(calls)}:{len(calls)}"
        calls[key] = _CALLS[key] = call = Call(path, module, forward, in_spec, kept)
        answers = torch.ops.sidestream.kept_whole(tensors, key)
        if call.out_index == [None]:
            return answers[0]
        by_index = dict(zip(call.out_index, answers))
        return tuple(by_index.get(n) for n in range(2))

    return noted
