"""The step of a traced stage: its graph as a flat function, parameters fetched straight from where modules keep them.

Looking up ``self.layer1.conv.weight`` costs a Python call per dot. A stage does hundreds per tick, so its step looks
into the dictionaries of the modules instead; a tensor that is replaced there is seen as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from sidestream.circuit.stage import State, Values
from sidestream.errors import LayoutError

Check = tuple[int, str, torch.Size, torch.dtype]
"""What an input that comes from outside of the model must be: index, name, shape, type."""


@dataclass(frozen=True, eq=False)
class GraphStep:
    """``step`` of a stage without memory: a graph on inputs that are checked at the source."""

    function: Callable[..., Values]
    """The graph, with its inputs and then its parameters as arguments."""
    slots: tuple[tuple[dict[str, Any], str], ...]
    """Where each parameter is: dictionary and key."""
    checks: tuple[Check, ...] = ()

    def __call__(self, inputs: Values, state: State) -> tuple[Values, State]:
        with torch.no_grad():
            return self.with_gradients(inputs, state)

    def with_gradients(self, inputs: Values, state: State) -> tuple[Values, State]:
        """The same step in whatever gradient mode it is called in: what training calls."""
        for index, name, shape, dtype in self.checks:
            value = inputs[index]
            if not isinstance(value, torch.Tensor) or value.shape != shape or value.dtype != dtype:
                raise LayoutError(
                    f"input {name!r} was given as {_described(value)}, but the model was cut for a tensor of shape "
                    f"{tuple(shape)}, {dtype}; feed that, or cut the model again with such an example"
                )
        return self.function(*inputs, *[owner[key] for owner, key in self.slots]), state


def graph_step(module: fx.GraphModule, checks: tuple[Check, ...] = ()) -> GraphStep:
    """The step that runs ``module``, a graph with flat inputs and a tuple of outputs."""
    attributes = [node for node in module.graph.nodes if node.op == "get_attr"]
    graph, copies = fx.Graph(), {}
    for node in module.graph.find_nodes(op="placeholder"):
        copies[node] = graph.placeholder(node.name)
    for node in attributes:
        copies[node] = graph.placeholder(node.name)
    for node in module.graph.nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    flat = fx.GraphModule(module, graph, f"Flat{type(module).__name__}")
    return GraphStep(flat.forward, tuple(_slot(module, str(node.target)) for node in attributes), checks)


def _slot(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    for place in (owner._parameters, owner._buffers, owner._modules):
        if key in place:
            return place, key
    return vars(owner), key


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    return f"{type(value).__name__} {value!r}"[:80]
