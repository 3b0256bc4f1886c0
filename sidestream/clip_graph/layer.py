"""A piece of a clip's graph as a streaming layer: its clip form runs the graph, its step form the rules.

Every node has a timetable: frame ``n`` of its result is made in tick ``n * period + delay`` of the layer. The state is
``(tick, frames that are still needed, what rules remember)``; the tick is counted round once all beginnings are over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from sidestream.clip_graph.exported import Call
from sidestream.clip_graph.remembering import Slid
from sidestream.clip_graph.rules import Rule, Source, Timed
from sidestream.errors import LayoutError, ModelError
from sidestream.nn.steppable import Steppable
from sidestream.types import NOTHING


@dataclass(frozen=True)
class Piece:
    """Consecutive nodes of a graph between two values that everything goes through."""

    given: fx.Node
    answer: fx.Node
    given_times: Timed
    given_shape: tuple[int, ...]
    """Of a frame as it is on the wire."""
    given_dtype: torch.dtype
    answer_shape: tuple[int, ...]
    answer_dtype: torch.dtype
    fixed: dict[fx.Node, Call | None]
    """Values that no frame goes into, in order: how they are made; None for those of the model."""
    rules: dict[fx.Node, Rule]
    """In order. Times count in frames of ``given``."""
    longer_num: int
    """Frames of the clip that fixed values were traced for."""


class Plan:
    """The timetable of a piece, and what its state holds. Copies of a layer share it: it holds no weights."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self.real = {n: rule for n, rule in piece.rules.items() if not rule.is_view or n == piece.answer}
        self.views = {n: rule for n, rule in piece.rules.items() if n not in self.real}
        times = {piece.given: piece.given_times, **{n: rule._first for n, rule in piece.rules.items()}}
        last = times[piece.answer]
        times[piece.answer] = replace(last, delay=max(last.least, last.delay))
        self.times = times
        self.kept = _kept(piece, times, self.real)
        """How many frames of which values the state holds."""
        self.starts = [rule.start() for rule in self.real.values()]
        self.round = math.lcm(*(t.period for t in times.values()))
        special = {n: max(rule.num_special, times[n].limit or 0) for n, rule in piece.rules.items()}
        ends = [times[n].delay + times[n].period * (num + 1) for n, num in special.items()]
        held = [times[n].delay + times[n].period * (k + 1) for n, k in self.kept.items()]
        self.steady = max([0, *ends, *held])
        """From this tick on, all rounds are alike."""
        is_timeless = all(t.delay == 0 and t.period == 1 for t in times.values())
        self.has_memory = bool(self.kept) or any(s is not None for s in self.starts) or not is_timeless

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self


class GraphLayer(Steppable):
    """The layer. Its parameters are the model's own, under the model's names."""

    def __init__(self, piece: Piece, part: nn.Module) -> None:
        """``part``: a module with the parameters and buffers that the piece reads, under their names."""
        super().__init__()
        self.part = part
        self._plan = plan = Plan(piece)
        self._slots = {n.name: _slot(part, str(n.target)) for n, call in piece.fixed.items() if call is None}
        self.period_ticks, self.delay_ticks = plan.times[piece.answer].period, plan.times[piece.answer].delay

    @property
    def has_memory(self) -> bool:
        """Whether a tick needs anything of those before."""
        return self._plan.has_memory

    def init_state(self, frame_BCHW: Tensor) -> Any:
        return (0, ((),) * len(self._plan.kept), tuple(self._plan.starts)) if self.has_memory else None

    def step(self, frame_BCHW: Tensor, state: Any) -> tuple[Any, Any]:
        self._check(frame_BCHW)
        if not self.has_memory:
            answer, _, _ = self._tick(0, frame_BCHW, {}, self._plan.starts, None)
            return answer, None
        tick, kept, memories = state
        answer, held, memories = self._tick(tick, frame_BCHW, dict(zip(self._plan.kept, kept)), memories, None)
        after = tick + 1
        if after >= self._plan.steady + self._plan.round:
            after -= self._plan.round
        return answer, (after, tuple(held.values()), tuple(memories))

    def finish(self, state: Any) -> tuple[Any, ...]:
        """The answers whose frames reach over the end of the stream."""
        if not self.has_memory:
            return ()
        num, kept, memories = state
        total = self._lengths(num)[self._plan.piece.answer]
        given = 0 if num - 1 < self.delay_ticks else (num - 1 - self.delay_ticks) // self.period_ticks + 1
        answers: list[Any] = []
        held, tick = dict(zip(self._plan.kept, kept)), num
        while given + len(answers) < total:
            answer, held, memories = self._tick(tick, None, held, memories, num)
            answers += [] if answer is NOTHING else [answer]
            tick += 1
        return tuple(answers)

    def forward(self, clip_BTCHW: Tensor) -> Any:
        piece = self._plan.piece
        num = clip_BTCHW.shape[1]
        lengths = self._lengths(num)
        if min(lengths.values()) < 1:
            node = next(n for n, length in lengths.items() if length < 1)
            raise LayoutError(f"a clip of {num} frames is too short: nothing is left of it at {node.name}; give more")
        self._check(clip_BTCHW[:, 0])
        values: dict[fx.Node, Any] = self._fixed()
        place = piece.given_times.place
        values[piece.given] = list(clip_BTCHW.unbind(1)) if place is None else place.from_clip(clip_BTCHW)
        for node, rule in piece.rules.items():
            values[node] = rule.whole(values.__getitem__, [lengths[s.node] for s in rule.sources])
        answer, times = values[piece.answer], self._plan.times[piece.answer]
        if times.place is None:
            return torch.stack(answer, dim=1)
        return times.place.to_clip(answer, lengths[piece.answer])

    def blank(self, frame_BCHW: Tensor) -> Tensor:
        return frame_BCHW.new_zeros(self._plan.piece.answer_shape, dtype=self._plan.piece.answer_dtype)

    def _check(self, frame: Tensor) -> None:
        piece = self._plan.piece
        if tuple(frame.shape) != piece.given_shape or frame.dtype != piece.given_dtype:
            raise LayoutError(
                f"a frame of shape {tuple(frame.shape)}, {frame.dtype} was given to a stream that was made for "
                f"{piece.given_shape}, {piece.given_dtype}; feed that, or make the stream with such a clip"
            )

    def _fixed(self) -> dict[fx.Node, Any]:
        values: dict[fx.Node, Any] = {}
        for node, call in self._plan.piece.fixed.items():
            if call is None:
                owner, key = self._slots[node.name]
                values[node] = getattr(owner, key)
            else:
                values[node] = call(values.__getitem__, self._plan.piece.longer_num)
        return values

    def _lengths(self, num: int) -> dict[fx.Node, int]:
        lengths = {self._plan.piece.given: num}
        for node, rule in self._plan.piece.rules.items():
            lengths[node] = rule.length([lengths[s.node] for s in rule.sources])
        return lengths

    def _tick(
        self, tick: int, frame: Tensor | None, kept: dict[fx.Node, tuple[Any, ...]], memories: Sequence[Any],
        end: int | None,
    ) -> tuple[Any, dict[fx.Node, tuple[Any, ...]], list[Any]]:  # fmt: skip
        """One tick: ``(answer, frames kept, memories)``. ``end``: frames of the stream, once it is over."""
        piece, times = self._plan.piece, self._plan.times
        lengths = None if end is None else self._lengths(end)
        fixed = self._fixed()
        owners = (piece.given, *self._plan.real)
        rows: dict[fx.Node, tuple[Any, ...]] = {n: kept.get(n, ()) for n in owners}
        newest = {n: _newest(times[n], tick, None if lengths is None else lengths[n]) for n in owners}
        if frame is not None:
            place = piece.given_times.place
            value = frame if place is None else place.from_wire(frame)
            if (
                self.has_memory
            ):  # its owner may change it, and an operation may hand it on as it is (dropout, contiguous)
                value = value.clone()
            rows[piece.given] = (*rows[piece.given], value)

        def ends_of(rule: Rule) -> list[int] | None:
            return None if lengths is None else [lengths[s.node] for s in rule.sources]

        def fetch(node: fx.Node, n: int) -> Any:
            if node in fixed:
                return fixed[node]
            if n < 0 or (lengths is not None and n >= lengths[node]):
                return None
            if node in self._plan.views:
                rule = self._plan.views[node]
                return rule.frame(n, fetch, None, ends_of(rule))[0]
            return rows[node][n - newest[node] - 1]

        after = []
        for (node, rule), memory in zip(self._plan.real.items(), memories):
            own = times[node]
            n, rest = divmod(tick - own.delay, own.period)
            if rest == 0 and n == newest[node] >= 0:
                value, memory = rule.frame(n, fetch, memory, ends_of(rule))
                rows[node] = (*rows[node], value)
            after.append(memory)
        own = times[piece.answer]
        answer: Any = NOTHING
        n, rest = divmod(tick - own.delay, own.period)
        if rest == 0 and n == newest[piece.answer] >= 0:
            answer = rows[piece.answer][-1]
            answer = answer if own.place is None else own.place.to_wire(answer)
            if self.has_memory and not isinstance(self._plan.real[piece.answer], Slid):
                answer = answer.clone()  # it may lie in the memory of a frame that is kept
        return answer, {n: rows[n][-k:] for n, k in self._plan.kept.items()}, after

    def extra_repr(self) -> str:
        return (
            f"{self._plan.piece.given.name} -> {self._plan.piece.answer.name}, {len(self._plan.piece.rules)} operations"
        )


def _newest(times: Timed, tick: int, length: int | None) -> int:
    """Number of the newest frame of a value after ``tick``; below 0 before the first."""
    newest = (tick - times.delay) // times.period
    for most in (times.limit, length):
        newest = newest if most is None else min(newest, most - 1)
    return newest


def _kept(piece: Piece, times: Mapping[fx.Node, Timed], real: Mapping[fx.Node, Rule]) -> dict[fx.Node, int]:
    """How many frames of each value later ticks still need; values that none needs are not there."""
    kept: dict[fx.Node, int] = {}
    for node, rule in real.items():
        for source in _looked_up(rule.sources, piece, real):
            gap = times[node].delay - times[source.node].delay
            num = gap // times[source.node].period - source.first + 1
            if gap % times[source.node].period == 0:
                num -= 1  # the newest comes in that very tick
            if source.first > 0 and times[source.node].place is None:
                num = max(num, 1)  # at the end of the stream the last goes with a step in time that is not full
            if num > 0:
                kept[source.node] = max(num, kept.get(source.node, 0))
    return {n: kept[n] for n in times if n in kept}


def _looked_up(sources: Sequence[Source], piece: Piece, real: Mapping[fx.Node, Rule]) -> list[Source]:
    """Sources with views replaced by what they look at."""
    found: list[Source] = []
    for source in sources:
        if source.node == piece.given or source.node in real:
            found.append(source)
            continue
        for inner in _looked_up(piece.rules[source.node].sources, piece, real):
            first = source.first * inner.stride + inner.first
            found.append(replace(inner, stride=source.stride * inner.stride, first=first))
    return found


def _slot(part: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    owner = part.get_submodule(path)
    if not hasattr(owner, key):
        raise ModelError(f"{name} is not a parameter, buffer or attribute of the model")
    return owner, key
