"""What a model can remember from one call to the next, found, kept and put back.

A forward can write to buffers, and to much that no module registers: attributes (tensors, lists, dicts, counters,
objects), what closures and hooks hold, attributes of classes, globals of the model's own code, generators of random
numbers. A ``Snapshot`` walks over all of it. Two snapshots tell what a call has changed; one puts everything back.

Not seen: what lies behind C extensions, other processes and files, and code of torch itself.
"""

from __future__ import annotations

import functools
import random
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sidestream.circuit import undo
from sidestream.circuit.same import same_leaf

MOST_OBJECTS = 200_000
"""Objects that are looked at; a model that holds more is looked at so far."""
MOST_GLOBAL_ITEMS = 1000
"""A global table with more entries than this is not the memory of a model."""
_OWN_KEYS = frozenset(vars(nn.Module())) | {"sidestream_info", "_is_full_backward_hook"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.memory_format)
_OPAQUE = (type, types.ModuleType, types.BuiltinFunctionType)
_CACHE = type(functools.lru_cache(lambda: None))


class Snapshot:
    """All that a model remembers at this moment.

    ``buffers``: a copy of each registered buffer by dotted name. ``others``: everything else by a readable path;
    tensors as copies, plain values as they are. ``places``: where each of these is, a table and a key, where it lies in
    an attribute of a module, or of an object or a list or dict in one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.buffers: dict[str, Any] = {}
        self.others: dict[str, Any] = {}
        self.places: dict[str, tuple[Any, Any]] = {}
        self._undo: list[Callable[[], None]] = []
        self._seen: dict[int, Any] = {}
        self._caches: list[tuple[Any, int]] = []
        self._registered = {id(buffer) for buffer in model.buffers()}
        self._undo.append(undo.shared_generators())
        self._is_new(model)
        self._module("", model)

    def restore(self) -> None:
        """Put everything back to what it was, in place. May be called again."""
        with torch.no_grad():
            for put_back in self._undo:
                put_back()

    def forget_new_cache_entries(self) -> None:
        """Empty each ``lru_cache`` that was filled since (while tracing, with what is no tensor afterwards)."""
        for cache, num_misses in self._caches:
            if cache.cache_info().misses != num_misses:
                cache.cache_clear()

    def changed(self, later: Snapshot) -> list[str]:
        """Paths, buffers left out, that were written between this snapshot and the later one."""
        return _changed(self.others, later.others)

    def changed_buffers(self, later: Snapshot) -> list[str]:
        """Dotted names of the buffers that were written between this snapshot and the later one."""
        return _changed(self.buffers, later.buffers)

    def _is_new(self, value: Any) -> bool:
        if id(value) in self._seen or len(self._seen) >= MOST_OBJECTS:
            return False
        self._seen[id(value)] = value
        return True

    def _module(self, path: str, module: nn.Module) -> None:
        own = vars(module)
        for table in (own, module._parameters, module._buffers, module._modules):
            self._undo.append(undo.dict_of(table))
        for name, buffer in module._buffers.items():
            self.buffers[_joined(path, name)] = self._tensor(buffer)
        for name, child in module._modules.items():
            if child is not None and self._is_new(child):
                self._module(_joined(path, name), child)
        for name, value in own.items():
            if name not in _OWN_KEYS:
                self.places[_joined(path, name)] = (own, name)
                self._visit(_joined(path, name), value)
        for hooks in _HOOKS:
            for hook in own.get(hooks, {}).values():
                self._visit(f"{path or 'the model'} (hook {getattr(hook, '__name__', type(hook).__name__)})", hook)
        self._class(type(module))

    def _visit(self, path: str, value: Any, depth: int = 0) -> None:
        """Look at any value; what it holds is looked at once, under the first path that leads to it."""
        if isinstance(value, _PLAIN):
            self.others[path] = value
        elif isinstance(value, _OPAQUE) or depth > 12 or isinstance(value, nn.Parameter):
            pass
        elif isinstance(value, Tensor):
            if id(value) not in self._registered:
                self.others[path] = self._tensor(value)
        elif self._is_new(value):
            self._look_inside(path, value, depth)

    def _look_inside(self, path: str, value: Any, depth: int) -> None:
        if isinstance(value, nn.Module):
            self._module(path, value)
        elif isinstance(value, dict):
            self._undo.append(undo.dict_of(value))
            self._items(path, dict.items(value), depth, value)
        elif isinstance(value, list | deque):
            self._undo.append(undo.list_of(value))
            self.others[f"len({path})"] = len(value)
            self._items(path, enumerate(value), depth, value)
        elif isinstance(value, tuple):
            self._items(path, enumerate(value), depth)
        elif isinstance(value, set | frozenset):
            if isinstance(value, set):
                self._undo.append(undo.set_of(value))
            self.others[path] = frozenset(item for item in value if isinstance(item, _PLAIN))
            self.others[f"len({path})"] = len(value)
        elif isinstance(value, np.ndarray):
            self.others[path] = value.copy()
            self._undo.append(undo.array(value))
        elif isinstance(value, torch.Generator | random.Random | np.random.Generator | np.random.RandomState):
            self.others[path], put_back = undo.generator(value)
            self._undo.append(put_back)
        elif isinstance(value, _CACHE):
            self._caches.append((value, value.cache_info().misses))
            self._visit(path, value.__wrapped__, depth + 1)
        elif callable(value) and self._callable(path, value, depth):
            pass
        else:
            self._object(path, value, depth)

    def _items(self, path: str, items: Any, depth: int, table: Any = None) -> None:
        for key, item in list(items):
            where = f"{path}[{key!r}]" if isinstance(key, str | int) else f"{path}[...]"
            if table is not None and path in self.places:
                self.places[where] = (table, key)
            self._visit(where, item, depth + 1)

    def _object(self, path: str, value: Any, depth: int) -> None:
        """An object of the user's: its attributes."""
        if _is_of_torch(type(value)):
            return
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            self._undo.append(undo.dict_of(own))
            for name, item in list(own.items()):
                if path in self.places:
                    self.places[f"{path}.{name}"] = (own, name)
                self._visit(f"{path}.{name}", item, depth + 1)
        for name in (n for cls in type(value).__mro__ for n in _slots_of(cls)):
            if hasattr(value, name):
                self._undo.append(functools.partial(object.__setattr__, value, name, getattr(value, name)))
                self._visit(f"{path}.{name}", getattr(value, name), depth + 1)
        self._class(type(value))

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
        if _is_of_torch(function):
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            try:
                content = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            self._undo.append(functools.partial(setattr, cell, "cell_contents", content))
            self._visit(f"{name} (of {path})", content, depth + 1)
        for item in (function.__defaults__, function.__kwdefaults__, function.__dict__):
            if item:
                self._visit(f"{path} ({function.__name__})", item, depth + 1)
        for name in _names_in(function.__code__):
            if name in function.__globals__ and not name.startswith("__"):
                self._global(function.__globals__, name, depth)

    def _global(self, table: dict[str, Any], name: str, depth: int) -> None:
        value = table[name]
        where = f"the global {name} of {table.get('__name__', '?')}"
        if isinstance(value, _PLAIN):
            self._undo.append(functools.partial(table.__setitem__, name, value))
            self.others[where] = value
        elif isinstance(value, list | dict | set | deque):
            if len(value) <= MOST_GLOBAL_ITEMS:
                self._undo.append(functools.partial(table.__setitem__, name, value))
                self._visit(where, value, depth + 1)
        elif isinstance(value, Tensor | np.ndarray | _CACHE | torch.Generator):
            self._undo.append(functools.partial(table.__setitem__, name, value))
            self._visit(where, value, depth + 1)
        elif isinstance(value, types.FunctionType) and not _is_of_torch(value) and self._is_new(value):
            self._function(name, value, depth + 1)

    def _class(self, cls: type) -> None:
        for kind in cls.__mro__:
            if kind is object or _is_of_torch(kind) or not self._is_new(kind):
                continue
            for name, value in list(vars(kind).items()):
                value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if isinstance(value, types.FunctionType):
                    if self._is_new(value):
                        self._function(f"{kind.__name__}.{name}", value, 0)
                elif isinstance(value, _CACHE):
                    self._visit(f"{kind.__name__}.{name}", value)
                elif not name.startswith("__") and isinstance(value, (*_PLAIN, list, dict, set, deque, Tensor)):
                    self._undo.append(functools.partial(undo.set_class_attribute, kind, name, value))
                    self._visit(f"{kind.__name__}.{name}", value)

    def _tensor(self, value: Tensor | None) -> Tensor | None:
        """A copy of a tensor, which it is put back to."""
        if value is None or type(value).__name__ == "FakeTensor":
            return None
        copy = value.detach().clone()
        if self._is_new(value):
            self._undo.append(undo.tensor(value, copy))
        return copy


@contextmanager
def kept(model: nn.Module) -> Iterator[Snapshot]:
    """Whatever happens inside, the model and the shared random generators are afterwards as they were before."""
    before = Snapshot(model)
    try:
        yield before
    finally:
        before.restore()


def is_of_hook(path: str) -> bool:
    """Whether a path of a ``Snapshot`` leads to what a hook remembers."""
    return "(hook " in path


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    missing = object()
    paths = dict.fromkeys([*before, *after])
    return [p for p in paths if not same_leaf(before.get(p, missing), after.get(p, missing))]


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_of_torch(thing: Any) -> bool:
    module = getattr(thing, "__module__", None) or ""
    return module == "torch" or module.startswith(("torch.", "einops.", "numpy.", "builtins"))


def _slots_of(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(s for s in slots if s not in ("__dict__", "__weakref__"))


@functools.lru_cache(maxsize=4096)
def _names_in(code: types.CodeType) -> tuple[str, ...]:
    """Global names that a function or one inside of it uses."""
    inner = (name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names_in(const))
    return tuple(dict.fromkeys([*code.co_names, *inner]))
