"""The tensors that a random program has made so far, alive, and the blanks of a statement that they fill."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fuzz.program import namespace

_MOST_ELEMENTS, _MOST_VALUE = 2000, 1e3
_KINDS = {"f": torch.float32, "i": torch.int64, "m": torch.bool, "e": torch.float64}


class NothingFits(Exception):
    """No tensor that was made so far fits a blank."""


class Pool:
    """Names and live values; a statement is tried on them before it becomes part of the program."""

    def __init__(self, rng: random.Random, features: Iterable[str]) -> None:
        self.rng, self.features = rng, frozenset(features)
        self.model = nn.Module()
        self.values: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        self.setup: dict[str, str] = {}
        self.shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        """Shape and type of each buffer: they stay."""
        self._number = 0

    def new(self, prefix: str = "v") -> str:
        self._number += 1
        return f"{prefix}{self._number}"

    def add_input(self, name: str, value: Tensor) -> None:
        self.values[name] = self.inputs[name] = value

    def pick(self, fits: Callable[[Tensor], bool], *, to_write: bool = False) -> str:
        """A name whose tensor fits, rather a late one."""
        names = [n for n, v in self.values.items() if fits(v) and not (to_write and not self._may_write(v))]
        if not names:
            raise NothingFits
        if to_write or self.rng.random() < 0.3:
            return self.rng.choice(names)
        return names[-1 - min(int(self.rng.expovariate(0.5)), len(names) - 1)]

    def _may_write(self, value: Tensor) -> bool:
        if torch._debug_has_internal_overlap(value) == 1:
            return False
        place = value.untyped_storage().data_ptr()
        if any(p.untyped_storage().data_ptr() == place for p in self.model.parameters()):
            return False
        owners = (("input writes", self.inputs.values()), ("buffer writes", self.model.buffers()))
        return all(
            feature in self.features or all(t.untyped_storage().data_ptr() != place for t in tensors)
            for feature, tensors in owners
        )

    def buffer(self, like: Tensor | None) -> str:
        """A buffer with the shape and type of a tensor, an old one or a new one; None: any old one."""
        names = [n for n, s in self.shapes.items() if like is None or s == (like.shape, like.dtype)]
        if names and (like is None or self.rng.random() < 0.6):
            return self.rng.choice(names)
        if like is None or len(self.shapes) >= 4:
            raise NothingFits
        name = self.new("h")
        shape, dtype = tuple(like.shape), str(like.dtype)
        start = f"torch.zeros({shape}, dtype={dtype})"
        if like.is_floating_point() and self.rng.random() < 0.4:
            start = f"torch.linspace(-1, 1, {like.numel()}, dtype={dtype}).reshape({shape})"
        tail = ", persistent=False" if self.rng.random() < 0.2 else ""
        self.attach(name, f'self.register_buffer("{name}", {start}{tail})')
        self.shapes[name] = (like.shape, like.dtype)
        return name

    def attach(self, name: str, line: str) -> None:
        """Make an attribute of the model, by its line of ``__init__``."""
        exec(line, {**namespace(), "self": self.model})
        self.setup[name] = line

    def attempt(self, code: str) -> bool:
        """Run a statement on the live values; False when it cannot be part of the program."""
        before, buffers = dict(self.values), dict(self.model._buffers)
        names: dict[str, Any] = {**namespace(), **self.values, "self": self.model}
        try:
            with torch.no_grad():
                exec(code, names)
            made = {n: v for n, v in names.items() if re.fullmatch(r"v\d+", n) and v is not before.get(n)}
            if all(_is_sound(v) for v in made.values()) and self._buffers_are_sound():
                self.values.update(made)
                return True
        except Exception:
            pass
        self.model._buffers.update(buffers)
        self.values = before
        return False

    def _buffers_are_sound(self) -> bool:
        own = self.model._buffers
        return all((own[n].shape, own[n].dtype) == s and _is_sound(own[n]) for n, s in self.shapes.items())


def _is_sound(value: Any) -> bool:
    if not isinstance(value, Tensor) or not 0 < value.numel() <= _MOST_ELEMENTS or value.is_complex():
        return False
    return bool(value.isfinite().all()) and float(value.abs().max() if value.dtype != torch.bool else 0) < _MOST_VALUE


_TENSOR = re.compile(r"\{([fimeaw]\d?)\}")


def fill(pool: Pool, statement: str) -> tuple[str, dict[str, str]] | None:
    """A statement with its blanks filled, and the attribute it needs ({} for none); None where nothing fits."""
    code, _, attribute = statement.partition(" | ")
    blanks = Blanks(pool)
    try:
        if first := _TENSOR.search(code):
            blanks[first[1]]
        code = code.format_map(blanks)
        return code, {blanks["id"]: f"self.{blanks['id']} = {attribute.format_map(blanks)}"} if attribute else {}
    except (NothingFits, IndexError, ValueError):
        return None


class Blanks(dict[str, str]):
    """The blanks of one statement, each filled when it is first asked for. See ``statements.py`` for their names."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool, self.rng = pool, pool.rng
        self.first: Tensor | None = None

    def __missing__(self, key: str) -> str:
        kind = key.rstrip("0123456789")
        fill = getattr(self, f"_{kind}", None)
        self[key] = fill(key) if fill else self._tensor(kind, key[len(kind) :])
        return self[key]

    def _seen(self, name: str) -> str:
        if self.first is None:
            self.first = self.pool.values[name]
        return name

    def _tensor(self, kind: str, rank: str) -> str:
        """``{f}``: float32; ``{i}``: int64; ``{m}``: bool; ``{e}``: float64; ``{a}``: any; a digit is the rank."""
        dtype = _KINDS.get(kind)
        return self._seen(
            self.pool.pick(
                lambda t: (dtype is None or t.dtype == dtype) and (not rank or t.dim() == int(rank)) and t.dim() > 0
            )
        )

    def _w(self, key: str) -> str:
        """A float tensor to be written to."""
        return self._seen(self.pool.pick(lambda t: t.is_floating_point() and t.dim() > 0, to_write=True))

    def _s(self, key: str) -> str:
        """Another of the shape and type of the first."""
        first = self._first()
        return self.pool.pick(lambda t: t.shape == first.shape and t.dtype == first.dtype)

    def _b(self, key: str) -> str:
        """One that can be broadcast to the first, of its type."""
        first = self._first()

        def fits(t: Tensor) -> bool:
            try:
                return t.dtype == first.dtype and torch.broadcast_shapes(t.shape, first.shape) == first.shape
            except RuntimeError:
                return False

        return self.pool.pick(fits)

    def _mask(self, key: str) -> str:
        """A bool tensor of the shape of the first."""
        first = self._first()
        return self.pool.pick(lambda t: t.dtype == torch.bool and t.shape == first.shape)

    def _first(self) -> Tensor:
        if self.first is None:
            raise NothingFits
        return self.first

    def _out(self, key: str) -> str:
        return self.pool.new()

    def _id(self, key: str) -> str:
        return self.pool.new("m")

    def _h(self, key: str) -> str:
        """A buffer like the first tensor."""
        return self.pool.buffer(self._first())

    def _old(self, key: str) -> str:
        """A buffer that is there already."""
        name = self.pool.buffer(None)
        if self.first is None:
            self.first = self.pool.model._buffers[name]
        return name

    def _counter(self, key: str) -> str:
        """A buffer of one whole number."""
        return self.pool.buffer(torch.zeros((), dtype=torch.int64))

    def _plain(self, key: str) -> str:
        """A tensor attribute that is no buffer."""
        name = self.pool.new("t")
        self.pool.attach(name, f"self.{name} = torch.zeros({tuple(self._first().shape)})")
        return name

    def _module(self, key: str) -> str:
        """A module that was called before."""
        names = [name for name, _ in self.pool.model.named_children()]
        if not names:
            raise NothingFits
        return self.rng.choice(names)

    def _d(self, key: str) -> str:
        """An axis of the first."""
        dim = self.rng.randrange(self._first().dim())
        return str(dim if self.rng.random() < 0.7 else dim - self._first().dim())

    def _n(self, key: str) -> str:
        """An index that every axis of the first has, mostly 0 or 1."""
        return str(self.rng.randrange(min(self._first().shape)))

    def _c(self, key: str) -> str:
        """A small number."""
        return self.rng.choice(("0.5", "-1.0", "0.25", "2.0", "1.5", "-0.125", "1"))

    def _size(self, key: str) -> str:
        """The size of the axis that the digit names, from the end (1: last), or of axis 1 (no digit)."""
        sizes = self._first().shape
        return str(sizes[-int(key[4:])] if key[4:] else sizes[1])

    def _shape(self, key: str) -> str:
        return str(tuple(self._first().shape))

    def _type(self, key: str) -> str:
        return str(self._first().dtype)

    def _count(self, key: str) -> str:
        return str(self._first().numel())

    def _perm(self, key: str) -> str:
        axes = list(range(self._first().dim()))
        self.rng.shuffle(axes)
        return ", ".join(map(str, axes))

    def _slice(self, key: str) -> str:
        """An index with slices, for the first."""
        first = self._first()
        axis = self.rng.randrange(first.dim())
        size = first.shape[axis]
        start = self.rng.randrange(size)
        stop = self.rng.randint(start + 1, size)
        item = self.rng.choice((f"{start}:{stop}", f"{start}:", f":{stop}", "::2", f"{start}", f"{start - size}:"))
        if self.rng.random() < 0.2:
            return f"..., {item}"
        return ", ".join([":"] * axis + [item])

    def _reshape(self, key: str) -> str:
        """Another shape with as many elements."""
        sizes, n = list(self._first().shape), self._first().numel()
        options = [f"{n}", "-1", f"1, {n}", *[f"{n // p}, {p}" for p in (2, 3, 4) if n % p == 0]]
        if len(sizes) > 1:
            merged = [*sizes[:-2], sizes[-2] * sizes[-1]]
            options += [f"{sizes[0]}, -1", f"-1, {sizes[-1]}", ", ".join(map(str, merged))]
        return self.rng.choice(options)
