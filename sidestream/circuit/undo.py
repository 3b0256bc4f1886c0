"""Functions that put one thing back to what it is now, in place, and only if it was changed."""

from __future__ import annotations

import copy
import random
import types
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidestream.circuit.same import same_leaf

Undo = Callable[[], None]
PYTHONS, NUMPYS = "the generator of the module random", "the generator of the module numpy.random"


def shared_generators() -> Undo:
    """The random generators that everybody shares: torch's, Python's and numpy's."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def undo() -> None:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

    return undo


def shared_states() -> dict[str, Any]:
    """Where the generators of Python and numpy stand, whose draws no graph shows."""
    numbers = np.random.get_state()
    return {PYTHONS: random.getstate(), NUMPYS: (numbers[1].tobytes(), *numbers[2:])}  # type: ignore[index,union-attr]


def dict_of(table: dict[Any, Any]) -> Undo:
    """A dict: the same objects under the same keys."""
    kept = {key: dict.__getitem__(table, key) for key in keys_of(table)}

    def undo() -> None:
        if keys_of(table) != list(kept) or any(dict.get(table, k, kept) is not v for k, v in kept.items()):
            table.clear()
            table.update(kept)

    return undo


def keys_of(table: dict[Any, Any]) -> list[Any]:
    """The keys of a dict in its order, as they lie there, whatever a subclass makes of them."""
    return list(OrderedDict.keys(table) if isinstance(table, OrderedDict) else dict.keys(table))


def list_of(items: list[Any] | deque[Any]) -> Undo:
    """A list or deque: the same objects in the same order."""
    kept = list(items)

    def undo() -> None:
        if len(items) != len(kept) or any(a is not b for a, b in zip(items, kept)):
            items.clear()
            items.extend(kept)

    return undo


def set_of(items: set[Any]) -> Undo:
    """A set."""
    kept = set(items)

    def undo() -> None:
        if items != kept:
            items.clear()
            items.update(kept)

    return undo


def bytes_of(values: Any) -> Undo:
    """A bytearray or an array of the array module."""
    kept = values[:]

    def undo() -> None:
        if values != kept:
            values[:] = kept

    return undo


def parameter(value: Tensor) -> Undo:
    """A parameter: the memory and the gradient that it has, and whether it takes one; not the numbers in the memory."""
    grad, requires_grad, data = value.grad, value.requires_grad, value.data

    def undo() -> None:
        if not same_memory(value, data):
            value.data = data
        if value.grad is not grad:
            value.grad = grad
        if value.requires_grad != requires_grad:
            value.requires_grad_(requires_grad)

    return undo


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same place, also as to their kind."""
    if a.layout is not torch.strided or b.layout is not torch.strided or a.device.type == "meta":
        return True
    return (a.data_ptr(), a.shape, a.stride(), a.dtype, a.is_inference()) == (
        b.data_ptr(), b.shape, b.stride(), b.dtype, b.is_inference()
    )  # fmt: skip


def array(values: np.ndarray) -> Undo:
    """A numpy array."""
    kept = values.copy()

    def undo() -> None:
        if not same_leaf(values, kept):
            values[...] = kept

    return undo


def generator(source: Any) -> tuple[Any, Undo]:
    """A generator of random numbers: its state as something to compare, and the way back."""
    if isinstance(source, torch.Generator):
        state = source.get_state()
        return state, lambda: _ignored(source.set_state(state))
    if isinstance(source, np.random.Generator):
        bits = source.bit_generator.state
        return repr(bits), lambda: setattr(source.bit_generator, "state", bits)
    if isinstance(source, random.Random):
        whole = source.getstate()
        return repr(whole), lambda: source.setstate(whole)
    legacy = source.get_state()
    return repr(legacy), lambda: source.set_state(legacy)


def iterator(source: Iterator[Any]) -> tuple[Any, Iterator[Any] | None]:
    """How far an iterator has come, as something to compare, and a copy of it; None where it cannot be copied."""
    if isinstance(source, types.GeneratorType):
        frame = source.gi_frame
        return (None if frame is None else (frame.f_lasti, repr(frame.f_locals)[:500])), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copies of these go away in Python 3.14
        try:
            return repr(source.__reduce__()), copy.deepcopy(source)
        except Exception:
            return repr(source), None


def slot(owner: Any, name: str) -> Undo:
    """An attribute that lies in a slot."""
    kept = getattr(owner, name)

    def undo() -> None:
        if getattr(owner, name, None) is not kept:
            object.__setattr__(owner, name, kept)

    return undo


def entry(table: Any, key: Any, value: Any) -> Undo:
    """An entry of a dict or list, back to a copy of ``value``."""

    def undo() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table[key] = copy.deepcopy(value)

    return undo


def tensor(value: Tensor, kept: Tensor) -> Undo:
    """A tensor, back to the values of ``kept``."""

    def undo() -> None:
        if same_leaf(value, kept):
            return
        if value.shape != kept.shape or value.layout is not torch.strided:
            value.data = kept.clone()
            return
        with torch.inference_mode(value.is_inference()):
            value.detach().copy_(kept)

    return undo


class ClassTable:
    """The attributes of a class, as a table."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def __getitem__(self, name: str) -> Any:
        return vars(self.kind)[name]

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self.kind, name, value)

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict."""
        return vars(self.kind).get(name, default)

    def put_back(self, name: str, value: Any) -> None:
        """Set an attribute if it is another one."""
        if vars(self.kind).get(name) is not value:
            setattr(self.kind, name, value)


def _ignored(result: Any) -> None:
    return None
