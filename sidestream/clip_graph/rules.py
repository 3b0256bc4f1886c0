"""What becomes of an operation of a clip's graph when its clip comes frame by frame.

Frame ``n`` of a result is made in tick ``n * period + delay`` from frames of what goes in. A rule says which: it
declares period, delay and length, and computes one frame (``frame``) or all of them (``whole``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from sidestream.clip_graph.exported import Call
from sidestream.clip_graph.place import Place

Fetch = Callable[[fx.Node, int], Any]
"""``fetch(node, n)``: frame n of a value; None before the first and behind the last. Values without frames: n is 0."""


@dataclass(frozen=True)
class Timed:
    """A value that comes frame by frame."""

    place: Place | None
    """Where its time lies; None for an answer about all frames so far, which has no axis for it."""
    period: int
    delay: int
    limit: int | None = None
    """Frames that there are at most: of a value about the beginning of the stream."""
    least: int = 0
    """The tick before which none can be read: where the first frames are read before those that make up the delay."""


@dataclass(frozen=True)
class Fixed:
    """A value that no frame goes into: weights and what is made of them."""

    depends_on_length: bool
    value: Any
    """As it is for the longer clip."""


@dataclass(frozen=True)
class Source:
    """An input of a rule that comes frame by frame, and which of its frames are read for frame ``n``.

    The oldest of them is ``n * stride + first``."""

    node: fx.Node
    times: Timed
    stride: int = 1
    first: int = 0


class Rule(ABC):
    """One operation on streams."""

    sources: tuple[Source, ...]
    times: Timed | tuple[Timed | None, ...]
    """Of the result; of each part of a result that is a tuple."""
    is_view: bool = False
    """Whether its frames are those of its sources, or constant ones: such a value is not kept, but looked up. Its delay
    may be below 0, where frames can be read before they would be due."""

    @property
    def period(self) -> int:
        return self._first.period

    @property
    def delay(self) -> int:
        return self._first.delay

    @property
    def limit(self) -> int | None:
        return self._first.limit

    @property
    def _first(self) -> Timed:
        return self.times if isinstance(self.times, Timed) else next(t for t in self.times if t is not None)

    @property
    def num_special(self) -> int:
        """Frames at the beginning that are made in another way than those that follow."""
        return 0

    def length(self, lengths: Sequence[int]) -> int:
        """Frames of the result for so many of each source."""
        return min(lengths)

    def start(self) -> Any:
        """What the rule remembers of older results, at the beginning of a stream."""
        return None

    @abstractmethod
    def frame(self, n: int, fetch: Fetch, memory: Any, end: Sequence[int] | None) -> tuple[Any, Any]:
        """``(frame n, memory)``. ``end``: frames of each source, where they are known: at the end of the stream."""

    @abstractmethod
    def whole(self, value_of: Callable[[fx.Node], Any], lengths: Sequence[int]) -> Any:
        """All frames at once."""


class FrameByFrame(Rule):
    """An operation that treats every frame alike and by itself.

    Answers about all so far may come at several rates: then the slowest counts, and goes with the newest of the others
    that belong to its step in time.
    """

    def __init__(
        self,
        call: Call,
        sources: Sequence[Source],
        times: Timed | tuple[Timed | None, ...],
        constant: dict[fx.Node, tuple[Place, int]],
        *,
        is_view: bool = False,
    ) -> None:
        """``constant``: values without frames that are alike along time: where, and how long they are."""
        self.is_view = is_view
        self.call, self.sources, self.times, self._constant = call, tuple(sources), times, constant

    def length(self, lengths: Sequence[int]) -> int:
        slowest = max(source.stride for source in self.sources)
        if slowest == 1:
            return min(lengths)
        return min(length for source, length in zip(self.sources, lengths) if source.stride == 1)

    def frame(self, n: int, fetch: Fetch, memory: Any, end: Sequence[int] | None) -> tuple[Any, Any]:
        at = {s.node: n * s.stride + s.first for s in self.sources}
        if end is not None:
            at = {s.node: min(at[s.node], num - 1) for s, num in zip(self.sources, end)}

        def value_of(node: fx.Node) -> Any:
            if node not in at:
                return self._one(node, fetch(node, 0))
            return fetch(node, at[node])

        return self.call(value_of, 1), memory

    def whole(self, value_of: Callable[[fx.Node], Any], lengths: Sequence[int]) -> Any:
        num = self.length(lengths)
        if any(source.times.place is None for source in self.sources):
            of_frames = {source.node for source in self.sources}

            def fetch(node: fx.Node, k: int) -> Any:
                return value_of(node)[k] if node in of_frames else value_of(node)

            return [self.frame(n, fetch, None, lengths)[0] for n in range(num)]

        def value(node: fx.Node) -> Any:
            if node in self._constant:
                place, _ = self._constant[node]
                return place.repeated(self._one(node, value_of(node)), num)
            return value_of(node)

        return self.call(value, num)

    def _one(self, node: fx.Node, value: Any) -> Any:
        if node not in self._constant:
            return value
        place, num = self._constant[node]
        return place.frame(value, 0, num)


class Part(Rule):
    """One tensor of a result that is a tuple."""

    is_view = True

    def __init__(self, source: Source, index: int) -> None:
        self.sources, self.index, self.times = (source,), index, source.times

    def frame(self, n: int, fetch: Fetch, memory: Any, end: Sequence[int] | None) -> tuple[Any, Any]:
        return fetch(self.sources[0].node, n)[self.index], memory

    def whole(self, value_of: Callable[[fx.Node], Any], lengths: Sequence[int]) -> Any:
        return value_of(self.sources[0].node)[self.index]
