"""Rules of operations along time that compute nothing: their frames are looked up in what goes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sidestream.clip_graph.exported import Back, Call
from sidestream.clip_graph.place import Place
from sidestream.clip_graph.rules import Fetch, Rule, Source, Timed


class Sliced(Rule):
    """``x[start : T - back : step]`` along time; the end shows ``back`` frames later."""

    is_view = True

    def __init__(self, call: Call, source: Source, *, start: int, back: int, most: int | None) -> None:
        """``most``: frames from the start where the end is counted from there."""
        times = source.times
        step = source.stride
        delay = times.delay + (start + back) * times.period
        limit = None if most is None else max(0, -(-(most - start) // step))
        self.call, self.sources, self._start, self._back = call, (source,), start, back
        self.times = Timed(times.place, times.period * step, delay, limit, times.least)

    @property
    def num_special(self) -> int:
        return self.limit or 0

    def length(self, lengths: Sequence[int]) -> int:
        long = max(0, -(-(lengths[0] - self._back - self._start) // self.sources[0].stride))
        return long if self.limit is None else min(long, self.limit)

    def frame(self, n: int, fetch: Fetch, memory: Any, end: Sequence[int] | None) -> tuple[Any, Any]:
        source = self.sources[0]
        return fetch(source.node, n * source.stride + self._start), memory

    def whole(self, value_of: Callable[[fx.Node], Any], lengths: Sequence[int]) -> Any:
        return self.call(value_of, lengths[0])


@dataclass(frozen=True)
class Constant:
    """Frames that are always the same: of a value without frames, or a number."""

    num: int
    node: fx.Node | None = None
    place: Place | None = None
    number: float = 0.0
    shape: tuple[int, ...] = ()
    """Of a frame of numbers."""
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None


class InARow(Rule):
    """Concatenation and padding along time: constant frames, then those of the stream, then constant ones again."""

    is_view = True

    def __init__(
        self,
        call: Call,
        parts: Sequence[Source | Constant],
        times: Timed,
        *,
        on_frame: Callable[[Any], Any] = lambda x: x,
        repeats: bool = False,
    ) -> None:
        """``on_frame``: what is done to each frame, as padding in space. ``repeats``: the first and last frame stand
        for what is not there, instead of constants."""
        self.call, self.parts, self.times = call, tuple(parts), times
        self.sources = tuple(p for p in parts if isinstance(p, Source))
        self._on_frame, self._repeats = on_frame, repeats

    @property
    def num_special(self) -> int:
        return sum([p.num if isinstance(p, Constant) else p.times.limit or 0 for p in self.parts])

    def length(self, lengths: Sequence[int]) -> int:
        return sum(lengths) + sum([p.num for p in self.parts if isinstance(p, Constant)])

    def frame(self, n: int, fetch: Fetch, memory: Any, end: Sequence[int] | None) -> tuple[Any, Any]:
        limits = [s.times.limit for s in self.sources]
        lengths = iter(limits if end is None else end)
        for position, part in enumerate(self.parts):
            num = part.num if isinstance(part, Constant) else next(lengths)
            if num is None or n < num:
                break
            if position + 1 < len(self.parts):
                n -= num
        if isinstance(part, Source):
            return self._on_frame(fetch(part.node, n)), memory
        if self._repeats:
            source = self.sources[0]
            last = 0 if position == 0 or end is None else end[0] - 1
            return self._on_frame(fetch(source.node, last)), memory
        if part.node is None:
            return torch.full(part.shape, part.number, dtype=part.dtype, device=part.device), memory
        assert part.place is not None
        return part.place.frame(fetch(part.node, 0), n, part.num), memory

    def whole(self, value_of: Callable[[fx.Node], Any], lengths: Sequence[int]) -> Any:
        return self.call(value_of, lengths[0])


class Written(Rule):
    """``base`` with the frames from ``low`` to ``high`` replaced: by those of a stream, or by constant ones."""

    is_view = True

    def __init__(
        self,
        call: Call,
        base: Source | Constant,
        by: Source | Constant,
        low: int | Back,
        high: int | Back,
        times: Timed,
    ) -> None:
        self.call, self.base, self.by, self.low, self.high, self.times = call, base, by, low, high, times
        self.sources = tuple(p for p in (base, by) if isinstance(p, Source))

    @property
    def num_special(self) -> int:
        return max([b for b in (self.low, self.high) if isinstance(b, int)], default=0)

    def length(self, lengths: Sequence[int]) -> int:
        if isinstance(self.base, Source):
            return lengths[0]
        # the base is constant, and as long as what is written is, with what it leaves out
        left = self.low if isinstance(self.low, int) else 0
        return lengths[0] + left + (self.high.frames if isinstance(self.high, Back) else 0)

    def frame(self, n: int, fetch: Fetch, memory: Any, end: Sequence[int] | None) -> tuple[Any, Any]:
        num = None if end is None else self.length(end)
        low, high = (_before(b, n, num) for b in (self.low, self.high))
        part = self.by if low and not high else self.base
        start = 0
        if part is self.by:
            start = self.low if isinstance(self.low, int) else (num or 0) - self.low.frames
        if isinstance(part, Source):
            return fetch(part.node, n - start), memory
        assert part.node is not None
        assert part.place is not None
        return part.place.frame(fetch(part.node, 0), n - start if part is self.by else 0, part.num), memory

    def whole(self, value_of: Callable[[fx.Node], Any], lengths: Sequence[int]) -> Any:
        num = self.length(lengths)

        def value(node: fx.Node) -> Any:
            if isinstance(self.base, Constant) and node is self.base.node:
                assert self.base.place is not None
                return self.base.place.repeated(self.base.place.frame(value_of(node), 0, self.base.num), num)
            return value_of(node)

        return self.call(value, num)


def _before(bound: int | Back, n: int, num: int | None) -> bool:
    """Whether ``bound`` lies at ``n`` or before it; the end is far away while it is not known."""
    if isinstance(bound, int):
        return bound <= n
    return num is not None and num - bound.frames <= n
