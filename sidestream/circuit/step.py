"""The step of a traced stage: its graph as a flat function, parameters fetched straight from where modules keep them.

Looking up ``self.layer1.conv.weight`` costs a Python call per dot. A stage does hundreds per tick, so its step looks
into the dictionaries of the modules instead; a tensor that is replaced there is seen as ever.

A stage that writes to buffers takes copies of them as its state: each run has its own, an old state stays valid, and
the model's own buffers are not touched. Without a state (in training) it works on the model's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from sidestream.circuit.measure import storage_of
from sidestream.circuit.stage import State, Values, strided_copy
from sidestream.errors import CircuitError, LayoutError

Check = tuple[int, str, torch.Size, torch.dtype]
"""What an input that comes from outside of the model must be: index, name, shape, type."""
Slot = tuple[dict[str, Any], str]
"""Where a parameter or buffer is: dictionary and key."""


@dataclass(frozen=True, eq=False)
class GraphStep:
    """``step`` of a stage that is a graph: its inputs are checked at the source; its state is the buffers it writes."""

    function: Callable[..., Values]
    """The graph, with its inputs and then its parameters as arguments."""
    slots: tuple[Slot, ...]
    """Where each parameter is."""
    checks: tuple[Check, ...] = ()
    written: tuple[int, ...] = ()
    """Which slots hold buffers that the graph writes to, or that share memory with one."""
    held: HeldBuffers | None = None
    """Buffers of modules that are kept whole."""
    no_gradients: str = ""
    """Why the graph cannot go back; empty where it can."""

    def __call__(self, inputs: Values, state: State) -> tuple[Values, State]:
        with torch.no_grad():
            return self._run(inputs, state)

    def with_gradients(self, inputs: Values, state: State) -> tuple[Values, State]:
        """The same step in whatever gradient mode it is called in: what training calls."""
        if self.no_gradients:
            raise CircuitError(self.no_gradients)
        return self._run(inputs, state)

    def init_buffers(self) -> State:
        """A state: copies of the buffers as the model has them now."""
        own = _copies([owner[key] for owner, key in map(self.slots.__getitem__, self.written)])
        return own, self.held.copies() if self.held else ()

    def memories(self) -> set[Any]:
        """The memory of the buffers that are its state."""
        own = [owner[key] for owner, key in map(self.slots.__getitem__, self.written)]
        held = [m._buffers[name] for m, name in self.held.buffers] if self.held else []
        return {storage_of(buffer) for buffer in (*own, *held) if buffer is not None}

    @property
    def has_buffers(self) -> bool:
        """Whether it has a state."""
        return bool(self.written) or self.held is not None

    def _run(self, inputs: Values, state: State) -> tuple[Values, State]:
        for index, name, shape, dtype in self.checks:
            value = inputs[index]
            if not isinstance(value, torch.Tensor) or value.shape != shape or value.dtype != dtype:
                raise LayoutError(
                    f"input {name!r} was given as {_described(value)}, but the model was cut for a tensor of shape "
                    f"{tuple(shape)}, {dtype}; feed that, or cut the model again with such an example"
                )
        parameters = [owner[key] for owner, key in self.slots]
        if state is None or not self.has_buffers:
            return self.function(*inputs, *parameters), state
        own = _copies(state[0])
        for n, buffer in zip(self.written, own):
            parameters[n] = buffer
        if self.held is None:
            return self.function(*inputs, *parameters), (own, ())
        with self.held.lent(state[1]) as after:
            outputs = self.function(*inputs, *parameters)
        return outputs, (own, after())


class HeldBuffers:
    """Buffers of modules that run whole: for the time of a call the modules are lent copies instead."""

    _locks: ClassVar[WeakKeyDictionary[nn.Module, threading.RLock]] = WeakKeyDictionary()

    def __init__(self, buffers: Sequence[tuple[nn.Module, str]]) -> None:
        self.buffers = tuple(buffers)
        self._owners = tuple({id(m): m for m, _ in buffers}.values())

    def copies(self) -> tuple[Tensor, ...]:
        """The buffers as they are now, copied."""
        with self._locked():
            return _copies([m._buffers[name] for m, name in self.buffers])

    @contextmanager
    def lent(self, buffers: Sequence[Tensor]) -> Iterator[Callable[[], tuple[Tensor, ...]]]:
        """Inside, the modules hold copies of ``buffers``; the yielded function gives what they hold at the end."""
        after: list[Tensor] = []
        with self._locked():
            before = [m._buffers[name] for m, name in self.buffers]
            try:
                for (m, name), buffer in zip(self.buffers, _copies(buffers)):
                    m._buffers[name] = buffer
                yield lambda: tuple(after)
                after += [m._buffers[name] for m, name in self.buffers]  # type: ignore[misc]
            finally:
                for (m, name), old in zip(self.buffers, before):
                    m._buffers[name] = old

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with ExitStack() as stack:
            for owner in sorted(self._owners, key=id):  # one order for all, so that none waits in a ring
                stack.enter_context(self._locks.setdefault(owner, threading.RLock()))
            yield


def graph_step(
    module: fx.GraphModule,
    checks: tuple[Check, ...] = (),
    *,
    written: Sequence[str] = (),
    held: Sequence[tuple[nn.Module, str]] = (),
    no_gradients: str = "",
) -> GraphStep:
    """The step that runs ``module``, a graph with flat inputs and a tuple of outputs.

    ``written``: names of the buffers that the graph writes to. ``held``: buffers of modules that are kept whole.
    """
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
    slots = tuple(_slot(module, str(node.target)) for node in attributes)
    numbers = tuple(n for n, node in enumerate(attributes) if str(node.target) in written)
    return GraphStep(flat.forward, slots, checks, numbers, HeldBuffers(held) if held else None, no_gradients)


def _slot(module: nn.Module, name: str) -> Slot:
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    for place in (owner._parameters, owner._buffers, owner._modules):
        if key in place:
            return place, key
    return vars(owner), key


def _copies(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Copies of tensors (None stays None); those that share memory share it afterwards, too."""
    if any(t is None for t in tensors):
        made = iter(_copies([t for t in tensors if t is not None]))
        return tuple(None if t is None else next(made) for t in tensors)
    return _copies_of([t for t in tensors if t is not None])


def _copies_of(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if len(tensors) < 2 or len({storage_of(t) for t in tensors}) == len(tensors):
        return tuple(strided_copy(t.detach()) for t in tensors)
    memories: dict[Any, Any] = {}
    copied = []
    for t in tensors:
        key = storage_of(t)
        if key not in memories:
            memories[key] = t.untyped_storage().clone()
        empty = torch.empty(0, dtype=t.dtype, device=t.device)
        copied.append(empty.set_(memories[key], t.storage_offset(), t.shape, t.stride()))
    return tuple(copied)


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    return f"{type(value).__name__} {value!r}"[:80]
