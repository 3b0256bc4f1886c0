"""Regions of a traced graph that run in another mode: ``with torch.autocast(...)`` inside of a model.

An export holds such a region as one node with a graph of its own. It is opened, so that stages may begin inside of it;
every node that comes out of it is marked, and runs of marked nodes are put back into one module per stage.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx, nn

_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
Autocast = tuple[str, Any, bool]
"""Kind of device, type (None: the device's own), whether it is on."""


class RegionInterpreter(fx.Interpreter):
    """Runs every node in the mode of its region."""

    def run_node(self, n: fx.Node) -> Any:
        with mode_of(n):
            return super().run_node(n)


def mode_of(node: fx.Node) -> AbstractContextManager[Any]:
    """The mode in which a node runs; none of its own for most."""
    region = node.meta.get("autocast")
    return nullcontext() if region is None else _autocast(region)


def _autocast(region: Autocast) -> torch.autocast:
    device, dtype, is_on = region
    return torch.autocast(device, dtype=dtype, enabled=is_on, cache_enabled=False)


def open_regions(module: fx.GraphModule) -> None:
    """Put the nodes of each autocast region into the graph itself, marked with the region."""
    while nodes := module.graph.find_nodes(op="call_function", target=_AUTOCAST):
        for node in nodes:
            _open(module, node)
    module.graph.lint()


def _open(module: fx.GraphModule, node: fx.Node) -> None:
    device, dtype, is_on, _, inner, *given = node.args
    assert isinstance(inner, fx.Node)
    region, path = module.get_submodule(str(inner.target)), str(inner.target)
    assert isinstance(region, fx.GraphModule)
    copies: dict[fx.Node, Any] = dict(zip(region.graph.find_nodes(op="placeholder"), given))
    answers: Sequence[Any] = ()
    for source in region.graph.nodes:
        if source.op == "placeholder":
            continue
        if source.op == "output":
            answers = fx.node.map_arg(source.args[0], copies.__getitem__)  # type: ignore[assignment]
            continue
        with module.graph.inserting_before(node):
            copy = module.graph.node_copy(source, copies.__getitem__)
        if source.op in ("get_attr", "call_module"):
            copy.target = f"{path}.{source.target}"
        copy.meta = dict(source.meta)
        copy.meta.setdefault("autocast", (device, dtype, is_on))
        copies[source] = copy
    for item in list(node.users):
        assert item.target is operator.getitem
        item.replace_all_uses_with(answers[item.args[1]])  # type: ignore[arg-type, index]
        module.graph.erase_node(item)
    module.graph.erase_node(node)
    if not inner.users:
        module.graph.erase_node(inner)


class InAutocast(nn.Module):
    """A graph that runs under autocast."""

    def __init__(self, graph: fx.GraphModule, region: Autocast) -> None:
        super().__init__()
        self.graph_module, self.region = graph, region

    def forward(self, *values: Any) -> Any:
        with _autocast(self.region):
            return self.graph_module(*values)


def close_regions(module: fx.GraphModule) -> None:
    """Put each run of nodes of one region into a module of its own, which sets the mode."""
    for number, run in enumerate(_runs(module.graph)):
        _close(module, run, f"autocast_{number}")
    if any(isinstance(m, InAutocast) for m in module.children()):
        module.graph.lint()
        module.recompile()


def _runs(graph: fx.Graph) -> list[list[fx.Node]]:
    runs: list[list[fx.Node]] = []
    previous: Any = None
    for node in graph.nodes:
        if node.op in ("get_attr", "placeholder"):
            continue
        region = node.meta.get("autocast") if node.op != "output" else None
        if region is not None and region == previous:
            runs[-1].append(node)
        elif region is not None:
            runs.append([node])
        previous = region
    return runs


def _close(module: fx.GraphModule, run: list[fx.Node], name: str) -> None:
    graph, members = module.graph, set(run)
    given = list(dict.fromkeys(n for node in run for n in node.all_input_nodes if n not in members))
    shown = [node for node in run if any(user not in members for user in node.users)]
    inner, copies = fx.Graph(), {}
    for n in given:
        copies[n] = inner.placeholder(n.name)
    for node in run:
        copies[node] = inner.node_copy(node, copies.__getitem__)
    inner.output(tuple(copies[node] for node in shown))
    for n in given:
        if n.op == "get_attr":
            run[0].prepend(n)
    module.add_submodule(name, InAutocast(fx.GraphModule(module, inner), run[0].meta["autocast"]))
    with graph.inserting_before(run[0]):
        call = graph.call_module(name, tuple(given))
        call.meta = {k: v for k, v in run[0].meta.items() if k in ("nn_module_stack", "stack_trace")}
        items = [graph.call_function(operator.getitem, (call, n)) for n in range(len(shown))]
    for node, item in zip(shown, items):
        node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in members)
    for node in reversed(run):
        graph.erase_node(node)
