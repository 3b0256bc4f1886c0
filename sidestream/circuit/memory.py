"""What a model can remember from one call to the next, found, kept and put back.

A forward can write to buffers, and to much that no module registers: attributes (tensors, lists, dicts, counters,
objects), what closures and hooks hold, attributes of classes, globals of the model's own code, generators of random
numbers. A ``Snapshot`` walks over all of it. Two snapshots tell what a call has changed; one puts everything back.

Not seen: what lies behind C extensions, other processes and files, and code of torch itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sidestream.circuit.same import same_leaf
from sidestream.circuit.walk import Walk


class Snapshot:
    """All that a model remembers at this moment.

    ``buffers``: a copy of each registered buffer by dotted name. ``others``: everything else by a readable path;
    tensors as copies, plain values as they are. ``places``: where each of these is, a table and a key, where it lies in
    an attribute of a module, or of an object or a list or dict in one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._walk = Walk(model)
        self.buffers, self.others, self.places = self._walk.buffers, self._walk.others, self._walk.places

    def restore(self) -> None:
        """Put everything back to what it was, in place. May be called again."""
        with torch.no_grad():
            for put_back in self._walk.undo:
                put_back()

    def forget_new_cache_entries(self) -> None:
        """Empty each ``lru_cache`` that was used since (while tracing, with what is no tensor afterwards)."""
        for n, (cache, info) in enumerate(self._walk.caches):
            if cache.cache_info() != info:
                cache.cache_clear()
                self._walk.caches[n] = cache, None  # its counts begin anew, and tell nothing any more

    def has_new_cache_entries(self) -> bool:
        """Whether an ``lru_cache`` was used since."""
        return any(cache.cache_info() != info for cache, info in self._walk.caches)

    @property
    def aliases(self) -> dict[int, str]:
        """Registered buffers (by identity) that an attribute names too, and that name."""
        return self._walk.aliases

    @property
    def fixed(self) -> list[tuple[str, Any, Any]]:
        """Plain values of globals and of classes: path, table, key."""
        return self._walk.fixed

    def changed(self, later: Snapshot) -> list[str]:
        """Paths, buffers left out, that were written between this snapshot and the later one."""
        return _changed(self.others, later.others)

    def changed_buffers(self, later: Snapshot) -> list[str]:
        """Dotted names of the buffers that were written between this snapshot and the later one."""
        return _changed(self.buffers, later.buffers)


@contextmanager
def kept(model: nn.Module) -> Iterator[Snapshot]:
    """Whatever happens inside, the model and the shared random generators are afterwards as they were before."""
    before = Snapshot(model)
    try:
        yield before
    finally:
        before.restore()
        before.forget_new_cache_entries()


@contextmanager
def other_weights(model: nn.Module) -> Iterator[None]:
    """Inside, the floating-point parameters hold other numbers; written so that no version counter moves."""
    tensors = [p.data for p in model.parameters() if p.is_floating_point()]
    tensors = [t for t in tensors if t.layout is torch.strided and not t.is_meta and not t.is_inference()]
    kept = [t.clone() for t in tensors]
    try:
        for t in tensors:
            t.mul_(1.25).add_(0.01)
        yield
    finally:
        for t, before in zip(tensors, kept):
            t.copy_(before)


def is_of_hook(path: str) -> bool:
    """Whether a path of a ``Snapshot`` leads to what a hook remembers."""
    return "(hook " in path


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    missing = object()
    paths = dict.fromkeys([*before, *after])
    return [p for p in paths if not same_leaf(before.get(p, missing), after.get(p, missing))]
