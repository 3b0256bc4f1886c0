"""Two pathways at different rates on one stream: what SlowFast needs beyond the ordinary combinators.

Between ``Split`` and ``Join`` a message of every tick is a pair (slow, fast); a tensor without elements stands for
nothing in this tick, so that pairs travel over wires as any two tensors do:

    tick           0        1        2        3        4
    Split       (f0,f0)  (.,f1)   (.,f2)   (.,f3)   (f4,f4)       alpha = 4
    ``Stage``: each pathway works on its own part at its own rate; what the lateral connection makes of the fast
               answers (one in alpha) waits for the slow ones, or they for it, and both are joined along the channels
    ``Join``   one map per slow step: slow channels, then the mean of alpha fast maps

In clip form a pair is two clips, (B, ceil(T / alpha), C, H, W) and (B, T, C', H, W). The delays of the stages do not
add up (the later pathway counts at every junction), so ``Join`` declares all of it, and the stages none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sidestream.nn.combine import Chain
from sidestream.nn.pool import AvgPool3d, Newest
from sidestream.nn.steppable import Steppable
from sidestream.types import NOTHING

Pair = tuple[Tensor, Tensor]
Queues = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


class Split(Steppable):
    """Every frame for the fast pathway, one in ``alpha`` (0, alpha, 2 alpha ...) also for the slow one."""

    def __init__(self, alpha: int) -> None:
        super().__init__()
        self.sampled = Newest(alpha)

    def init_state(self, frame_BCHW: Tensor) -> Any:
        return self.sampled.init_state(frame_BCHW)

    def step(self, frame_BCHW: Tensor, state: Any) -> tuple[Pair, Any]:
        slow, state = _stepped(self.sampled, frame_BCHW, state)
        return (slow, frame_BCHW), state

    def forward(self, clip_BTCHW: Tensor) -> Pair:
        return self.sampled(clip_BTCHW), clip_BTCHW

    def blank(self, frame_BCHW: Tensor) -> Pair:
        return self.sampled.blank(frame_BCHW), frame_BCHW


class Stage(Steppable):
    """A stage of both pathways and, unless None, the lateral connection from the fast to the slow one behind it.

    State: (state of ``slow``, of ``fast``, of ``lateral``, slow answers and lateral ones that wait for each other).
    """

    def __init__(self, slow: Steppable, fast: Steppable, lateral: Steppable | None = None) -> None:
        super().__init__()
        self.slow, self.fast, self.lateral = slow, fast, lateral

    def init_state(self, pair: Pair) -> tuple[Any, ...]:  # type: ignore[override]
        if self.lateral is None:
            return self.slow.init_state(pair[0]), self.fast.init_state(pair[1]), None, ((), ())
        fast_state, fast = self.fast.start(pair[1])
        return self.slow.init_state(pair[0]), fast_state, self.lateral.init_state(fast), ((), ())

    def start(self, pair: Pair) -> tuple[tuple[Any, ...], Pair]:
        slow_state, slow = self.slow.start(pair[0])
        fast_state, fast = self.fast.start(pair[1])
        lateral_state = None
        if self.lateral is not None:
            lateral_state, lateral = self.lateral.start(fast)
            slow = torch.cat([slow, lateral], dim=1)
        return (slow_state, fast_state, lateral_state, ((), ())), (slow, fast)

    def step(self, pair: Pair, state: tuple[Any, ...]) -> tuple[Pair, tuple[Any, ...]]:  # type: ignore[override]
        slow, slow_state = _stepped(self.slow, pair[0], state[0])
        fast, fast_state = _stepped(self.fast, pair[1], state[1])
        if self.lateral is None:
            return (slow, fast), (slow_state, fast_state, None, state[3])
        late, late_state = _stepped(self.lateral, fast, state[2])
        joined, queues = _joined(slow, late, state[3])
        return (joined, fast), (slow_state, fast_state, late_state, queues)

    def finish(self, state: tuple[Any, ...]) -> tuple[Pair, ...]:
        slow, fast = list(self.slow.finish(state[0])), list(self.fast.finish(state[1]))
        if self.lateral is not None:
            late = _through(self.lateral, fast, state[2])
            both = zip([*state[3][0], *slow], [*state[3][1], *late], strict=True)
            slow = [torch.cat(pair, dim=1) for pair in both]
        return (*((_nothing(x), x) for x in fast), *((x, _nothing(x)) for x in slow))

    def forward(self, clips: Pair) -> Pair:  # type: ignore[override]
        slow_BTCHW, fast_BTCHW = self.slow(clips[0]), self.fast(clips[1])
        if self.lateral is None:
            return slow_BTCHW, fast_BTCHW
        return torch.cat([slow_BTCHW, self.lateral(fast_BTCHW)], dim=2), fast_BTCHW

    def blank(self, pair: Pair) -> Pair:  # type: ignore[override]
        slow, fast = self.slow.blank(pair[0]), self.fast.blank(pair[1])
        return (slow if self.lateral is None else torch.cat([slow, self.lateral.blank(fast)], dim=1)), fast


class Join(Steppable):
    """Pairs to maps (B, C + C', H, W), one per slow step n: the slow map and the mean of alpha fast ones.

    Those are alpha * n ... alpha * (n + 1) - 1 (an incomplete last group gives no answer); if causal, the newest
    alpha up to alpha * n, zeros standing for those before the first. ``delays``: ticks by which the slow and the fast
    maps come late.
    """

    def __init__(self, alpha: int, *, delays: tuple[int, int] = (0, 0), is_causal: bool = False) -> None:
        super().__init__()
        self.mean = AvgPool3d((alpha, 1, 1), is_causal=is_causal)
        self.period_ticks = alpha
        self.delay_ticks = max(delays[0], delays[1] + self.mean.delay_ticks)

    def init_state(self, pair: Pair) -> tuple[Any, Queues]:  # type: ignore[override]
        return self.mean.init_state(pair[1]), ((), ())

    def step(self, pair: Pair, state: tuple[Any, Queues]) -> tuple[Any, tuple[Any, Queues]]:  # type: ignore[override]
        fast, mean_state = _stepped(self.mean, pair[1], state[0])
        joined, queues = _joined(pair[0], fast, state[1])
        return NOTHING if _is_nothing(joined) else joined, (mean_state, queues)

    def forward(self, clips: Pair) -> Tensor:  # type: ignore[override]
        fast_BTCHW = self.mean(clips[1])
        return torch.cat([clips[0][:, : fast_BTCHW.shape[1]], fast_BTCHW], dim=2)

    def blank(self, pair: Pair) -> Tensor:  # type: ignore[override]
        return torch.cat([pair[0], self.mean.blank(pair[1])], dim=1)


class Undivided(Steppable):
    """A chain as one layer, so that no wire runs between its layers."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.chain = chain
        self.delay_ticks, self.period_ticks = chain.delay_ticks, chain.period_ticks

    def init_state(self, frame_BCHW: Tensor) -> Any:
        return self.chain.init_state(frame_BCHW)

    def start(self, frame_BCHW: Any) -> tuple[Any, Any]:
        return self.chain.start(frame_BCHW)

    def step(self, frame_BCHW: Tensor, state: Any) -> tuple[Any, Any]:
        return self.chain.step(frame_BCHW, state)

    def finish(self, state: Any) -> tuple[Any, ...]:
        return self.chain.finish(state)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self.chain(clip_BTCHW)

    def blank(self, frame_BCHW: Tensor) -> Tensor:
        return self.chain.blank(frame_BCHW)


def two_pathways(stages: list[Stage], *, alpha: int, is_causal: bool) -> Chain:
    """Frames to the maps of ``Join``, every ``alpha`` ticks: Split, the stages, Join.

    Where the pathways look ahead they do so by different numbers of ticks, and at the end of the stream more pairs
    are owed than any one delay says; so only the causal chain can be cut between its stages.
    """
    join = Join(alpha, delays=_delays(stages, alpha), is_causal=is_causal)
    chain = Chain(Split(alpha), *stages, join)
    return chain if is_causal else Chain(Undivided(chain))


def _delays(stages: list[Stage], alpha: int) -> tuple[int, int]:
    """Ticks by which each pathway's maps come late; a slow layer looks ahead by slow steps, of alpha ticks each."""
    slow = fast = 0
    for part in stages:
        slow, fast = slow + part.slow.delay_ticks * alpha, fast + part.fast.delay_ticks
        if part.lateral is not None:
            slow = max(slow, fast + part.lateral.delay_ticks)
    return slow, fast


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _is_nothing(x: Tensor) -> bool:
    return x.numel() == 0


def _stepped(layer: Steppable, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """A step of one pathway, if there is anything for it in this tick."""
    if _is_nothing(x):
        return x, state
    answer, state = layer.step(x, state)
    return _nothing(x) if answer is NOTHING else answer, state


def _through(layer: Steppable, late: list[Tensor], state: Any) -> list[Tensor]:
    """All that ``layer`` still answers: to what comes late, and at its own end."""
    answers = []
    for x in late:
        answer, state = layer.step(x, state)
        answers += [] if answer is NOTHING else [answer]
    return [*answers, *layer.finish(state)]


def _joined(left: Tensor, right: Tensor, waiting: Queues) -> tuple[Tensor, Queues]:
    """One of each side, along the channels, as soon as there is one of each; what waits anew is copied."""
    queues = [queue if _is_nothing(x) else (*queue, x) for queue, x in zip(waiting, (left, right), strict=True)]
    answer = _nothing(left)
    if all(queues):
        answer = torch.cat([queue[0] for queue in queues], dim=1)
        queues = [queue[1:] for queue in queues]
    kept = [
        tuple(x if any(x is y for y in old) else x.clone() for x in queue)
        for queue, old in zip(queues, waiting, strict=True)
    ]
    return answer, (kept[0], kept[1])
