"""A walk over all that a model can remember: what a ``Snapshot`` is made of."""

from __future__ import annotations

import array
import functools
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sidestream.circuit import undo
from sidestream.circuit.code_names import (
    SameThing,
    globals_in,
    holds_state,
    is_library,
    is_near,
    is_of_torch,
    key_text,
    names_in,
    slots_of,
)
from sidestream.circuit.kinds import CACHE, OPAQUE, PLAIN, SOURCES, VALUES, may_hold_state

MOST_OBJECTS = 200_000
"""Objects that are looked at; a model that holds more is looked at so far."""
MOST_GLOBAL_ITEMS = 5000
"""A global table with more entries than this is not the memory of a model."""
_OWN_KEYS = (frozenset(vars(nn.Module())) | {"sidestream_info", "_is_full_backward_hook"}) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_HOOK_TABLES = (*_HOOKS, *(f"{name}_{kind}" for name in _HOOKS for kind in ("with_kwargs", "always_called")))
_MOST_PLAIN, _MOST_ITEMS = 2000, 20_000
"""Of a longer list or table of plain values only a copy is kept; of one of objects, so many are looked at."""


class Walk:
    """What was found, and how to put it back."""

    def __init__(self, model: nn.Module) -> None:
        self.buffers: dict[str, Any] = {}
        self.others: dict[str, Any] = {}
        self.places: dict[str, tuple[Any, Any]] = {}
        self.undo: list[Callable[[], None]] = []
        self.caches: list[tuple[Any, Any]] = []
        self.aliases: dict[int, str] = {}
        """Registered buffers (by identity) that an attribute names too."""
        self.fixed: list[tuple[str, Any, Any]] = []
        """Plain values of globals and classes: path, table, key."""
        self._seen: dict[int, Any] = {}
        self._paths: dict[int, str] = {}
        self._seen_globals: set[tuple[int, str]] = set()
        self._registered = {id(buffer) for buffer in model.buffers()}
        self.undo.append(undo.shared_generators())
        self.others |= undo.shared_states()
        self._is_new(model)
        self._module("", model)

    def _is_new(self, value: Any) -> bool:
        if id(value) in self._seen or len(self._seen) >= MOST_OBJECTS:
            return False
        self._seen[id(value)] = value
        return True

    def _module(self, path: str, module: nn.Module) -> None:
        own = vars(module)
        for table in (own, module._parameters, module._buffers, module._modules):
            self.undo.append(undo.dict_of(table))
        for name, parameter in module._parameters.items():
            if parameter is not None:
                self.undo.append(undo.parameter(parameter))
                self._attributes(_joined(path, name), parameter)
        for name, buffer in module._buffers.items():
            self.buffers[_joined(path, name)] = self._tensor(buffer)
            self._attributes(_joined(path, name), buffer)
        for name, child in module._modules.items():
            if child is not None and self._is_new(child) and not isinstance(child, torch.jit.ScriptModule):
                self._paths[id(child)] = _joined(path, name)
                self._module(_joined(path, name), child)
        for name, value in own.items():
            if name not in _OWN_KEYS:
                self.places[_joined(path, name)] = (own, name)
                self._visit(_joined(path, name), value)
        for hooks in _HOOK_TABLES:
            self.undo.append(undo.dict_of(own.get(hooks, {})))
        for hooks in _HOOKS:
            if own.get(hooks):
                self.others[f"hooks of {path or 'the model'}"] = [*map(SameThing, own[hooks].values())]
            for hook in own.get(hooks, {}).values():
                self._visit(f"{path or 'the model'} (hook {getattr(hook, '__name__', type(hook).__name__)})", hook)
        self._class(type(module))

    def _visit(self, path: str, value: Any, depth: int = 0) -> None:
        """Look at any value; what it holds is looked at once, under the first path that leads to it."""
        if isinstance(value, (*PLAIN, *VALUES)):
            self.others[path] = value
        elif isinstance(value, OPAQUE) or depth > 100:
            self.others[path] = SameThing(value)
        elif isinstance(value, nn.Parameter):
            pass
        elif isinstance(value, Tensor):
            if id(value) in self._registered:
                self.aliases[id(value)] = path
            else:
                self.others[path] = self._tensor(value)
        elif self._is_new(value):
            self._paths[id(value)] = path
            self._look_inside(path, value, depth)
        else:  # a name for something that was seen already: which thing it names may change
            self.others[path] = f"the same as {self._paths.get(id(value), '?')}"

    def _look_inside(self, path: str, value: Any, depth: int) -> None:
        if isinstance(value, nn.Module):
            self._module(path, value)
        elif isinstance(value, dict):
            self.undo.append(undo.dict_of(value))
            self.others[f"order of {path}"] = [key_text(key) for key in undo.keys_of(value)]
            self._items(path, [(key, dict.__getitem__(value, key)) for key in undo.keys_of(value)], depth, value)
        elif isinstance(value, list | deque):
            self.undo.append(undo.list_of(value))
            self.others[f"len({path})"] = len(value)
            self._items(path, enumerate(value), depth, value)
        elif isinstance(value, tuple):
            self._items(path, enumerate(value), depth)
        elif isinstance(value, set | frozenset):
            if isinstance(value, set):
                self.undo.append(undo.set_of(value))
            self.others[path] = frozenset(value)
        elif isinstance(value, weakref.ref):
            self._visit(path, value(), depth + 1)
        elif isinstance(value, bytearray | array.array):
            self.others[path] = bytes(value)
            self.undo.append(undo.bytes_of(value))
        elif isinstance(value, Iterator) and type(value).__module__ in ("itertools", "builtins"):  # no file
            self.others[path], copy_of = undo.iterator(value)
            if copy_of is not None and path in self.places:
                table, key = self.places[path]
                self.undo.append(undo.entry(table, key, copy_of))
        elif isinstance(value, np.ndarray) and value.dtype == object:
            self._items(path, enumerate(value.flat), depth)
        elif isinstance(value, np.ndarray):
            self.others[path] = value.copy()
            self.undo.append(undo.array(value))
        elif isinstance(value, SOURCES):
            self.others[path], put_back = undo.generator(value)
            self.undo.append(put_back)
        elif isinstance(value, CACHE):
            self.caches.append((value, value.cache_info()))
            self._visit(path, value.__wrapped__, depth + 1)
        elif callable(value) and self._callable(path, value, depth):
            pass
        else:
            self._object(path, value, depth)

    def _items(self, path: str, items: Any, depth: int, table: Any = None) -> None:
        found = list(items)
        if len(found) > _MOST_PLAIN and all(isinstance(item, PLAIN) for _, item in found):
            self.others[path] = found
            return
        for key, item in found[:_MOST_ITEMS]:
            where = f"{path}[{key_text(key)}]"
            if table is not None and path in self.places:
                self.places[where] = (table, key)
            self._visit(where, item, depth + 1)

    def _object(self, path: str, value: Any, depth: int) -> None:
        """An object of the user's: its attributes."""
        if is_of_torch(type(value)) or not holds_state(type(value)):
            return
        self._attributes(path, value, depth)
        for name in (n for cls in type(value).__mro__ for n in slots_of(cls)):
            if hasattr(value, name):
                self.undo.append(undo.slot(value, name))
                self._visit(f"{path}.{name}", getattr(value, name), depth + 1)
        self._class(type(value))

    def _attributes(self, path: str, value: Any, depth: int = 0) -> None:
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict) and (own or not isinstance(value, Tensor)):
            self.undo.append(undo.dict_of(own))
            for name, item in list(own.items()):
                if path in self.places:
                    self.places[f"{path}.{name}"] = (own, name)
                self._visit(f"{path}.{name}", item, depth + 1)

    def _callable(self, path: str, value: Any, depth: int) -> bool:
        """A function, a method, or a partial: what it holds. False: it is some other object."""
        if isinstance(value, types.MethodType):
            self._visit(path, value.__self__, depth + 1)
            self._visit(path, value.__func__, depth + 1)
        elif isinstance(value, functools.partial):
            for item in (value.func, value.args, value.keywords):
                self._visit(path, item, depth + 1)
        elif isinstance(value, types.FunctionType):
            self._function(path, value, depth)
        else:
            return False
        return True

    def _function(self, path: str, function: types.FunctionType, depth: int) -> None:
        if is_of_torch(function):
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            try:
                content = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            self.undo.append(functools.partial(setattr, cell, "cell_contents", content))
            self._visit(f"{name} (of {path})", content, depth + 1)
        for item in (function.__defaults__, function.__kwdefaults__, function.__dict__):
            if item:
                self._visit(f"{path} ({function.__name__})", item, depth + 1)
        names = names_in(function.__code__)
        for name in globals_in(function.__code__):
            if name in function.__globals__ and not name.startswith("__"):
                self._global(function.__globals__, name, names, depth)

    def _global(self, table: dict[str, Any], name: str, names: Sequence[str], depth: int) -> None:
        value = table[name]
        where = f"the global {name} of {table.get('__name__', '?')}"
        if isinstance(value, PLAIN):
            self.fixed.append((where, table, name))
        elif isinstance(value, list | dict | set | deque) and len(value) > MOST_GLOBAL_ITEMS:
            return
        elif isinstance(value, types.FunctionType) and not is_of_torch(value):
            if self._is_new(value):
                self._function(name, value, depth + 1)
            return
        elif isinstance(value, types.ModuleType):
            if not is_library(value.__name__.partition(".")[0]):
                self._imported(value, names)
            return
        elif isinstance(value, type):
            if is_near(value.__module__, table):
                self._class(value)
            return
        elif not may_hold_state(value, table):
            return
        self.undo.append(functools.partial(table.__setitem__, name, value))
        self.places[where] = (table, name)
        self._visit(where, value, depth + 1)

    def _imported(self, module: types.ModuleType, names: Sequence[str]) -> None:
        """What the user's own code uses of a module of its own that it imports."""
        table = vars(module)
        for name in names:
            if name in table and not name.startswith("__") and (id(table), name) not in self._seen_globals:
                self._seen_globals.add((id(table), name))
                self._global(table, name, names, 0)

    def _class(self, cls: type) -> None:
        for kind in cls.__mro__:
            if kind is object or is_of_torch(kind) or not self._is_new(kind):
                continue
            for name, value in list(vars(kind).items()):
                value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if isinstance(value, types.FunctionType):
                    if self._is_new(value):
                        self._function(f"{kind.__name__}.{name}", value, 0)
                elif isinstance(value, CACHE):
                    self._visit(f"{kind.__name__}.{name}", value)
                elif not name.startswith("__") and (
                    isinstance(value, PLAIN) or may_hold_state(value, {"__name__": kind.__module__})
                ):
                    where, table = f"{kind.__name__}.{name}", undo.ClassTable(kind)
                    self.undo.append(functools.partial(table.put_back, name, value))
                    self.places[where] = (table, name)
                    if isinstance(value, PLAIN):
                        self.fixed.append((where, table, name))
                    self._visit(where, value)

    def _tensor(self, value: Tensor | None) -> Tensor | None:
        """A copy of a tensor, which it is put back to."""
        if value is None or type(value).__name__ == "FakeTensor":
            return None
        copy = value.detach().clone()
        if self._is_new(value):
            self.undo.append(undo.tensor(value, copy))
        return copy


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
