"""What each node of a graph costs and makes: one recorded run, and the shortest of timed ones."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from sidestream.errors import CutError

COSTS = ("measured", "parameters", "flops", "uniform")
Costs = str | Sequence[float]
"""How the nodes are weighed: one of ``COSTS``, or one number per node."""
CALLS = ("call_function", "call_module", "call_method")


@dataclass(frozen=True)
class NodeRecord:
    """What one node did in a run on the example."""

    num_bytes: int
    """Size of the tensors it made."""
    storages: frozenset[Any]
    """Memory in which its output lies; nodes that share one are views of each other."""
    writes: frozenset[Any]
    """Memory that it changed in place."""


def record(module: fx.GraphModule, leaves: Sequence[Any]) -> dict[fx.Node, NodeRecord]:
    """One run of the graph that keeps, for every node, the sizes, storages and in-place writes."""
    recorder = _Recorder(module)
    with undisturbed(module), torch.no_grad():
        recorder.run(*own_copies(leaves))
    return recorder.records


def measure_costs(
    module: fx.GraphModule, leaves: Sequence[Any], *, num_runs: int = 7, budget_seconds: float = 2.5
) -> dict[fx.Node, float]:
    """Seconds of each call node on one thread: the least of ``num_runs`` runs after a warm-up.

    What else the machine does can only make a run longer, and where a boundary goes must not depend on it.

    Stops early once ``budget_seconds`` have passed (heavy models get fewer runs, at least one).
    """
    timer = _Timer(module)
    with undisturbed(module), one_thread(), torch.no_grad():
        leaves = own_copies(leaves)
        timer.run(*leaves)
        timer.seconds.clear()
        stop_at = time.perf_counter() + budget_seconds
        for _ in range(num_runs):
            timer.run(*leaves)
            if time.perf_counter() > stop_at:
                break
    return {node: min(seconds) for node, seconds in timer.seconds.items()}


def weigh(module: fx.GraphModule, leaves: Sequence[Any], costs: Costs) -> list[float]:
    """Cost of each call node, in order: measured seconds, numbers of parameters, floating point operations, or given.

    Raises CutError for an unknown name, or for given costs that are not one per node.
    """
    nodes = [node for node in module.graph.nodes if node.op in CALLS]
    if not isinstance(costs, str):
        return given_costs(costs, len(nodes))
    if costs not in COSTS:
        raise CutError(f"costs={costs!r} is unknown; choose one of {', '.join(COSTS)}, or give one number per node")
    if costs == "measured":
        seconds = measure_costs(module, leaves)
        return [seconds[node] for node in nodes]
    if costs == "flops":
        flops = _Flops(module)
        with undisturbed(module), torch.no_grad():
            flops.run(*own_copies(leaves))
        return [float(flops.flops[node]) for node in nodes]
    return [float(_num_parameters(module, node)) if costs == "parameters" else 1.0 for node in nodes]


def given_costs(costs: Sequence[float], num_items: int) -> list[float]:
    """The user's own costs, checked to be one per item."""
    if len(costs) != num_items:
        raise CutError(f"{len(costs)} costs were given for {num_items} nodes or layers; give one for each")
    return [float(cost) for cost in costs]


def num_bytes(value: Any) -> int:
    """Size of the tensors in ``value``."""
    return sum(t.numel() * t.element_size() for t in _tensors(value))


@contextmanager
def one_thread() -> Iterator[None]:
    """A single intra-op thread inside, as many as before outside."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Buffers (running statistics ...) and the random state are afterwards as they were before."""
    kept = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    with torch.random.fork_rng():
        yield
    with torch.no_grad():
        for buffer, before in kept:
            if not torch.equal(buffer, before):
                buffer.copy_(before)


def own_copies(leaves: Sequence[Any]) -> list[Any]:
    """The leaves with every tensor copied, so that a model that changes its input does not reach the caller's."""
    return [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def _num_parameters(module: fx.GraphModule, node: fx.Node) -> int:
    if node.op == "call_module":
        return sum(p.numel() for p in module.get_submodule(str(node.target)).parameters())
    attributes = [operator.attrgetter(str(n.target))(module) for n in node.all_input_nodes if n.op == "get_attr"]
    return sum(a.numel() for a in attributes if isinstance(a, nn.Parameter))


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _storages(value: Any) -> frozenset[Any]:
    return frozenset(StorageWeakRef(t.untyped_storage()) for t in _tensors(value))


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.records: dict[fx.Node, NodeRecord] = {}

    def run_node(self, n: fx.Node) -> Any:
        inputs = _tensors(self.fetch_args_kwargs_from_env(n)) if n.op in CALLS else []
        versions = [t._version for t in inputs]
        value = super().run_node(n)
        written = [t for t, version in zip(inputs, versions) if t._version != version]
        self.records[n] = NodeRecord(num_bytes(value), _storages(value), _storages(written))
        return value


class _Timer(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seconds: dict[fx.Node, list[float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in CALLS:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        start = time.perf_counter()
        value = getattr(self, n.op)(n.target, args, kwargs)
        self.seconds.setdefault(n, []).append(time.perf_counter() - start)
        return value


class _Flops(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.flops: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            value = super().run_node(n)
        self.flops[n] = counter.get_total_flops()
        return value
