"""Values beside the weights that a graph has taken over, and whether they are still what they were at the cut."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from sidestream.circuit.code_names import is_of_torch, names_in
from sidestream.circuit.same import same_leaf
from sidestream.errors import CircuitError

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_MOST_ITEMS, _MOST_DEPTH = 1000, 4


class Attribute:
    """A value in a table (the attributes of a module or a class, the globals of a module) that the graph took over."""

    def __init__(self, table: Any, key: str, name: str) -> None:
        self.table, self.key, self.name = table, key, name
        self.value = held(table.get(key))

    def is_in(self, paths: Collection[str]) -> bool:
        """Whether one of the paths leads to it, or to what it holds."""
        return any(path == self.name or path.startswith((f"{self.name}.", f"{self.name}[")) for path in paths)

    def check(self) -> None:
        """CircuitError where it is another one now."""
        if not is_as_it_was(self.value, held(self.table.get(self.key))):
            raise CircuitError(
                f"{self.name!r} of the model was changed after the cut, which took over its value; cut the model again"
            )


class Weight(Attribute):
    """A parameter of a model that keeps what it computed from its weights."""

    def check(self) -> None:
        """CircuitError where it was replaced or written to."""
        if not is_as_it_was(self.value, held(self.table.get(self.key))):
            raise CircuitError(
                f"the weight {self.name!r} was changed after the cut, but the model keeps values that its first call "
                "computed from its weights; cut the model again"
            )


def attributes_of(path: str, module: nn.Module) -> list[Attribute]:
    """What lies in the attributes of a module: all public ones, and private ones that its code names."""
    own = vars(module)
    methods = [
        getattr(v, "__func__", v) for cls in type(module).__mro__ if not is_of_torch(cls) for v in vars(cls).values()
    ]
    named = {name for f in methods if isinstance(f, types.FunctionType) for name in names_in(f.__code__)}
    keys = [key for key in own if key not in _OWN_KEYS and (not key.startswith("_") or key in named)]
    return [Attribute(own, key, f"{path}.{key}" if path else key) for key in keys]


_OWN_KEYS = frozenset(vars(nn.Module())) | {"sidestream_info"}


def held(value: Any, depth: int = 0) -> Any:
    """The value as something to compare: containers opened, tensors by identity and version, other things by identity.

    Objects of the user's are opened too; modules and what lies deep are taken as one thing.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.Tensor):
        return value, _version(value)
    if isinstance(value, np.ndarray) and value.size <= _MOST_ITEMS:
        return value.copy()
    if depth < _MOST_DEPTH:
        if isinstance(value, tuple | list | deque) and len(value) <= _MOST_ITEMS:
            return [held(item, depth + 1) for item in value]
        if isinstance(value, Mapping) and len(value) <= _MOST_ITEMS:
            return [(key, held(item, depth + 1)) for key, item in value.items()]
        own = getattr(value, "__dict__", None)
        is_opened = not isinstance(value, nn.Module | type | types.FunctionType | types.ModuleType)
        if isinstance(own, dict) and is_opened and not callable(value):
            return [_Thing(value), [(key, held(item, depth + 1)) for key, item in own.items()]]
    return _Thing(value)


class _Thing:
    def __init__(self, value: Any) -> None:
        self.value = value


def is_as_it_was(before: Any, now: Any) -> bool:
    """Whether two values from ``held`` are the same."""
    if isinstance(before, _Thing) or isinstance(now, _Thing):
        return isinstance(before, _Thing) and isinstance(now, _Thing) and _one(before.value, now.value)
    if isinstance(before, torch.Tensor) or isinstance(now, torch.Tensor):
        return before is now
    if isinstance(before, list | tuple):
        return type(before) is type(now) and len(before) == len(now) and all(map(is_as_it_was, before, now))
    return same_leaf(before, now)


def _one(a: Any, b: Any) -> bool:
    if isinstance(a, types.MethodType) and isinstance(b, types.MethodType):
        return a.__self__ is b.__self__ and a.__func__ is b.__func__
    return a is b


def _version(value: torch.Tensor) -> int:
    return 0 if value.is_inference() else value._version
