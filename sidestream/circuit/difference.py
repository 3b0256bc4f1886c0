"""Where a graph first differs from the model that it was traced from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sidestream.circuit.calls import called, copied
from sidestream.circuit.measure import own_copies
from sidestream.circuit.regions import RegionInterpreter
from sidestream.circuit.same import same_leaf
from sidestream.circuit.split import module_paths


def first_difference(
    model: nn.Module, graph: fx.GraphModule, probe: tuple[tuple[Any, ...], dict[str, Any]]
) -> fx.Node | None:
    """The first node that ends a module whose answer is another in the graph than in the model; None: none is found."""
    answers: list[tuple[str, Any]] = []

    def noting(path: str) -> Callable[..., None]:
        return lambda module, given, answer: answers.append((path, pytree.tree_map(copied, answer)))

    hooks = [m.register_forward_hook(noting(path)) for path, m in model.named_modules() if path]
    try:
        with torch.inference_mode(not model.training):
            called(model, *probe, records=model.training)
    finally:
        for hook in hooks:
            hook.remove()
    values = _Values(graph)
    leaves = pytree.tree_leaves(probe)
    with torch.no_grad():
        values.run(*own_copies(leaves))
    return _first_wrong(graph, answers, values.values)


class _Values(RegionInterpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n] = pytree.tree_map(copied, value)
        return value


def _first_wrong(graph: fx.GraphModule, answers: list[tuple[str, Any]], values: dict[fx.Node, Any]) -> fx.Node | None:
    """By module: the n-th call's last node; a module answers wrongly if no node of its last ones gives its answer."""
    ends: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        for path in module_paths(node):
            ends.setdefault(path, []).append(node)
    for path, answer in answers:
        nodes = ends.get(path)
        tensors = [leaf for leaf in pytree.tree_leaves(answer) if isinstance(leaf, Tensor)]
        if not nodes or not tensors:
            continue
        made = [leaf for n in nodes for leaf in pytree.tree_leaves(values.get(n)) if isinstance(leaf, Tensor)]
        if not all(any(same_leaf(t, m) for m in made) for t in tensors):
            return nodes[-1]
    return None
