"""Rules of operations that remember: a window of frames, a mean of all so far, the state of a recurrent layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sidestream.clip_graph.exported import Call
from sidestream.clip_graph.rules import Fetch, Rule, Source, Timed

ValueOf = Callable[[fx.Node], Any]


class Slid(Rule):
    """A convolution or pooling whose window goes over time, too."""

    def __init__(
        self,
        call: Call,
        source: Source,
        *,
        left: int,
        right: int,
        span: int,
        on_window: Callable[[Tensor, Callable[[fx.Node], Any]], Any],
        blank_value: float,
        times: tuple[Timed | None, ...] | Timed,
    ) -> None:
        """``span``: frames from the oldest to the newest of a window."""
        self.call, self.sources, self.times = call, (source,), times
        self.left, self.right, self.span = left, right, span
        self._on_window, self._blank = on_window, blank_value

    @property
    def num_special(self) -> int:
        return self.left

    def length(self, lengths: Sequence[int]) -> int:
        return max(0, (lengths[0] + self.left + self.right - self.span - 1) // self.sources[0].stride + 1)

    def frame(self, n: int, fetch: Fetch, memory: Any, end: Sequence[int] | None) -> tuple[Any, Any]:
        source = self.sources[0]
        place = source.times.place
        assert place is not None
        oldest = n * source.stride - self.left
        found = [fetch(source.node, k) for k in range(oldest, oldest + self.span + 1)]
        some = next(f for f in found if f is not None)
        blank = torch.full_like(some, self._blank) if any(f is None for f in found) else some
        window = place.joined([f if f is not None else blank for f in found])
        return self._on_window(window, lambda node: fetch(node, 0)), memory

    def whole(self, value_of: Callable[[fx.Node], Any], lengths: Sequence[int]) -> Any:
        return self.call(value_of, lengths[0])


class SoFar(Rule):
    """A mean, sum or maximum over all of time: of the frames so far, or of the newest ``newest`` of them."""

    def __init__(self, call: Call, source: Source, kind: str, newest: int | None, times: Timed) -> None:
        """``kind``: "mean", "sum", "max" or "last"."""
        self.call, self.sources, self.times, self._kind, self._newest = call, (source,), times, kind, newest

    @property
    def num_special(self) -> int:
        return self._newest or 0

    def start(self) -> Any:
        return ()

    def frame(self, n: int, fetch: Fetch, memory: Any, end: Sequence[int] | None) -> tuple[Any, Any]:
        source = self.sources[0].node
        value = self.call(lambda node: fetch(node, n if node is source else 0), 1)
        if self._kind == "last":
            return value, memory
        if self._newest is not None:
            kept = (*memory, value)[-self._newest :]
            return self._of(torch.stack(kept)), kept
        if not memory:
            count = torch.ones((), dtype=torch.float64, device=value.device)
            return value.clone(), ((value, count) if self._kind == "mean" else (value,))
        if self._kind == "mean":
            count = memory[1] + 1
            value = memory[0] + (value - memory[0]) / count.to(value.dtype)
            return value.clone(), (value, count)
        value = memory[0] + value if self._kind == "sum" else torch.maximum(memory[0], value)
        return value.clone(), (value,)

    def _of(self, values: Tensor) -> Tensor:
        if self._kind == "mean":
            return values.mean(0)
        return values.sum(0) if self._kind == "sum" else values.amax(0)

    def whole(self, value_of: Callable[[fx.Node], Any], lengths: Sequence[int]) -> list[Tensor]:
        place, node, num = self.sources[0].times.place, self.sources[0].node, lengths[0]
        assert place is not None
        frames = place.frames(value_of(node), num)
        each = [self.call(_with(node, f, value_of), 1) for f in frames]
        if self._kind == "last":
            return each
        starts = [0 if self._newest is None else max(0, n + 1 - self._newest) for n in range(num)]
        return [self._of(torch.stack(each[a : n + 1])) for n, a in enumerate(starts)]


class Recurrent(Rule):
    """LSTM, GRU and RNN along time; their state is the memory."""

    def __init__(self, call: Call, source: Source, times: tuple[Timed | None, ...]) -> None:
        self.call, self.sources, self.times = call, (source,), times
        self._first_state = call.args[1]

    def start(self) -> Any:
        return ()

    def frame(self, n: int, fetch: Fetch, memory: Any, end: Sequence[int] | None) -> tuple[Any, Any]:
        source = self.sources[0].node
        return self._step(lambda node: fetch(node, n if node is source else 0), memory)

    def _step(self, value_of: Callable[[fx.Node], Any], memory: Any) -> tuple[Any, Any]:
        given, call = {}, self.call
        if memory:
            states = self._first_state if isinstance(self._first_state, list) else [self._first_state]
            given = dict(zip(states, memory, strict=True))
        answer = call(lambda node: given[node] if node in given else value_of(node), 1)
        return answer, tuple(answer[1:])

    def whole(self, value_of: Callable[[fx.Node], Any], lengths: Sequence[int]) -> Any:
        place, node, num = self.sources[0].times.place, self.sources[0].node, lengths[0]
        assert place is not None
        memory, answers = self.start(), []
        for f in place.frames(value_of(node), num):
            answer, memory = self._step(_with(node, f, value_of), memory)
            answers.append(answer)
        return (place.joined([a[0] for a in answers]), *([a[k] for a in answers] for k in range(1, len(answers[0]))))


def _with(node: fx.Node, frame: Any, value_of: ValueOf) -> ValueOf:
    return lambda n: frame if n is node else value_of(n)
