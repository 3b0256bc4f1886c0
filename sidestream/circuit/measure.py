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

from sidestream.circuit.regions import RegionInterpreter, mode_of
from sidestream.circuit.same import same_tensor
from sidestream.circuit.stage import strides_of
from sidestream.errors import CutError
from sidestream.report.flops import counting_flops

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
    state: frozenset[Any] = frozenset()
    """Memory of the buffers of a module that is kept whole and may write to them."""
    draws: bool = False
    """It drew random numbers."""


def record(module: fx.GraphModule, leaves: Sequence[Any]) -> dict[fx.Node, NodeRecord]:
    """One run of the graph that keeps, for every node, the sizes, storages and in-place writes.

    CutError where a node fails that did not fail in the model.
    """
    recorder = _Recorder(module)
    with undisturbed(module), torch.no_grad():
        try:
            recorder.run(*own_copies(leaves))
        except Exception as error:
            raise CutError(
                f"the graph of the model fails at {recorder.at}: {type(error).__name__}: {str(error).splitlines()[0]}; "
                "keep the module around it whole: cut(model, example, cut=('its.dotted.name', ...))"
            ) from error
    return recorder.records


def hidden_buffers(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Buffers that a module which is kept whole may write to, also those that are None so far: all but the statistics
    of batch norms in eval mode, or of norms that keep none."""
    return [
        (m, name)
        for m in module.modules()
        for name, buffer in m._buffers.items()
        if name not in _STATISTICS or not _is_idle_norm(m)
    ]


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _is_idle_norm(module: nn.Module) -> bool:
    is_norm = isinstance(module, nn.modules.batchnorm._NormBase)
    return is_norm and (not module.training or not module.track_running_stats)


def measure_costs(
    module: fx.GraphModule, leaves: Sequence[Any], *, num_runs: int = 7, budget_seconds: float = 2.5
) -> dict[fx.Node, float]:
    """Seconds of each call node on one thread: the least of ``num_runs`` runs.

    What else the machine does, and that the first run is a cold one, can only make a run longer, and where a boundary
    goes must not depend on it.

    Stops early once ``budget_seconds`` have passed (heavy models get fewer runs, at least two).
    """
    timer = _Timer(module)
    with undisturbed(module), one_thread(), torch.no_grad():
        leaves = own_copies(leaves)
        stop_at = time.perf_counter() + budget_seconds
        for number in range(num_runs):
            timer.run(*leaves)
            if number > 0 and time.perf_counter() > stop_at:
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
    tables = [(m._buffers, dict(m._buffers)) for m in module.modules()]
    kept = [(b, b.detach().clone()) for _, table in tables for b in table.values() if b is not None]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for table, before in tables:
            table.update(before)
        for buffer, value in kept:
            if not same_tensor(buffer, value):
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.detach().copy_(value)


def own_copies(leaves: Sequence[Any]) -> list[Any]:
    """The leaves with every tensor copied (same values, same strides), so that none shares memory with another."""
    return [own_copy(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in memory of its own, laid out by the same strides; never an inference tensor."""
    with torch.inference_mode(False), torch.no_grad():
        if tensor.is_nested or tensor.device.type == "meta":
            kind = "nested tensor" if tensor.is_nested else "tensor without values (device meta)"
            raise CutError(f"the example holds a {kind}, which stages cannot take; give padded tensors with values")
        if tensor.layout is not torch.strided or tensor.is_quantized:
            return tensor.detach().clone()
        tensor = tensor.clone() if tensor.is_inference() else tensor.detach()
        empty = torch.empty_strided(tensor.shape, strides_of(tensor), dtype=tensor.dtype, device=tensor.device)
        return empty.copy_(tensor)


def _num_parameters(module: fx.GraphModule, node: fx.Node) -> int:
    if node.op == "call_module":
        return sum(p.numel() for p in module.get_submodule(str(node.target)).parameters())
    attributes = [operator.attrgetter(str(n.target))(module) for n in node.all_input_nodes if n.op == "get_attr"]
    return sum(a.numel() for a in attributes if isinstance(a, nn.Parameter))


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _storages(value: Any) -> frozenset[Any]:
    return frozenset(map(storage_of, _tensors(value)))


def storage_of(tensor: torch.Tensor) -> Any:
    """What stands for the memory of a tensor: equal for views of each other."""
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # sparse: it has no storage
        return id(tensor)


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class _Recorder(RegionInterpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.records: dict[fx.Node, NodeRecord] = {}
        self.at = "its start"
        self._buffers = {storage_of(b) for b in module.buffers()}
        self._modules = {m: _states_of(m) for m in _called_modules(module)}

    def run_node(self, n: fx.Node) -> Any:
        self.at = n.name
        if n.target in _SETS_MEMORY:
            raise NotImplementedError("Tensor.set_ gives a tensor other memory, which stages cannot follow")
        args, kwargs = self.fetch_args_kwargs_from_env(n) if n.op in CALLS else ((), {})
        inputs = _tensors((args, kwargs))
        versions = [_version(t) for t in inputs]
        buffers = [(t, t.clone()) for t in inputs if storage_of(t) in self._buffers]
        random_state = torch.get_rng_state() if n.op in CALLS else None
        state = self._modules.get(self.fetch_attr(str(n.target)), []) if n.op == "call_module" else []
        value = super().run_node(n)
        written = [t for t, version in zip(inputs, versions) if _version(t) != version]
        written += [t for t, before in buffers if not same_tensor(t, before)]
        written += _written_by_schema(n.target, args, kwargs)
        hidden = frozenset(storage_of(b) for b in state)
        draws = random_state is not None and not torch.equal(random_state, torch.get_rng_state())
        self.records[n] = NodeRecord(num_bytes(value), _storages(value), _storages(written) | hidden, hidden, draws)
        return value


def _called_modules(module: fx.GraphModule) -> set[nn.Module]:
    return {module.get_submodule(str(n.target)) for n in module.graph.find_nodes(op="call_module")}


def _states_of(module: nn.Module) -> list[torch.Tensor]:
    states = [owner._buffers[name] for owner, name in hidden_buffers(module)]
    return [state for state in states if state is not None]


_SETS_MEMORY = {getattr(torch.ops.aten.set_, name) for name in torch.ops.aten.set_.overloads()}
_NORMS = {
    torch.ops.aten.batch_norm.default: (3, 4, 5),
    torch.ops.aten.instance_norm.default: (3, 4, 5),
    torch.ops.aten.native_batch_norm.default: (3, 4, 5),
}
"""Operators that update running statistics without saying so: where mean, variance and the flag stand."""


def _written_by_schema(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Tensors that an operator says it writes to, or is known to."""
    if target in _NORMS:
        mean, variance, flag = (args[n] if n < len(args) else None for n in _NORMS[target])
        return [t for t in (mean, variance) if flag and t is not None]
    schema = getattr(target, "_schema", None)
    if schema is None:
        return []
    values = [*args, *[kwargs.get(a.name) for a in schema.arguments[len(args) :]]]
    named = zip(schema.arguments, values)
    return _tensors([v for a, v in named if a.alias_info is not None and a.alias_info.is_write])


class _Timer(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seconds: dict[fx.Node, list[float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in CALLS:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        with mode_of(n):
            start = time.perf_counter()
            value = getattr(self, n.op)(n.target, args, kwargs)
            self.seconds.setdefault(n, []).append(time.perf_counter() - start)
        return value


class _Flops(RegionInterpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.flops: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        with counting_flops() as counter:
            value = super().run_node(n)
        self.flops[n] = counter.get_total_flops()
        return value
