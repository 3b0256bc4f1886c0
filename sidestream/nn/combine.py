"""Streaming layers made of others: in a row, side by side, around a skip; and per-frame modules lifted to streams."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sidestream.errors import LayoutError, ModelError
from sidestream.nn.steppable import Steppable
from sidestream.types import NOTHING


class PerFrame(Steppable):
    """A module that looks at one frame at a time: no memory; the clip form folds time into the batch."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def init_state(self, frame_BCHW: Tensor) -> None:
        return None

    def step(self, frame_BCHW: Tensor, state: None) -> tuple[Any, None]:
        return self.module(frame_BCHW), state

    def forward(self, clip_BTCHW: Tensor) -> Any:
        num_streams, num_frames = clip_BTCHW.shape[:2]
        answers = self.module(clip_BTCHW.flatten(0, 1))
        return pytree.tree_map(lambda a: a.unflatten(0, (num_streams, num_frames)), answers)

    def blank(self, frame_BCHW: Tensor) -> Any:
        """As in evaluation mode, and with buffers put back: looking for the shape leaves no trace in a module."""
        modes = [(m, m.training) for m in self.module.modules() if m.training]
        buffers = [
            (m._buffers, name, b) for m in self.module.modules() for name, b in m._buffers.items() if b is not None
        ]
        for table, name, buffer in buffers:
            table[name] = buffer.clone()
        try:
            for module, _ in modes:
                module.training = False
            return super().blank(frame_BCHW)
        finally:
            for module, mode in modes:
                module.training = mode
            for table, name, buffer in buffers:
                table[name] = buffer


class Chain(Steppable):
    """Layers in a row; the state is a tuple with one entry per layer. Children are named "0", "1", ..."""

    def __init__(self, *layers: Steppable) -> None:
        super().__init__()
        for n, layer in enumerate(layers):
            if not isinstance(layer, Steppable):
                raise ModelError(
                    f"layer {n} of a Chain is a {type(layer).__name__}, which has no step form; "
                    "wrap a module that works frame by frame as PerFrame(module)"
                )
            self.add_module(str(n), layer)

    @property
    def layers(self) -> tuple[Steppable, ...]:
        return tuple(self._modules.values())  # type: ignore[arg-type]  # children() would drop repeats

    @property
    def delay_ticks(self) -> int:  # type: ignore[override]
        """Delays add up; that of a layer behind one that swallows counts in the ticks which get that far."""
        periods = [layer.period_ticks for layer in self.layers]
        return sum(layer.delay_ticks * math.prod(periods[:n]) for n, layer in enumerate(self.layers))

    @property
    def period_ticks(self) -> int:  # type: ignore[override]
        return math.prod(layer.period_ticks for layer in self.layers)

    def init_state(self, frame_BCHW: Tensor) -> tuple[Any, ...]:
        states, x = [], frame_BCHW
        for layer in self.layers[:-1]:
            state, x = layer.start(x)
            states.append(state)
        return tuple(states) + tuple(layer.init_state(x) for layer in self.layers[-1:])

    def start(self, frame_BCHW: Any) -> tuple[tuple[Any, ...], Any]:
        states, x = [], frame_BCHW
        for layer in self.layers:
            state, x = layer.start(x)
            states.append(state)
        return tuple(states), x

    def step(self, frame_BCHW: Any, state: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        """One frame through all layers; behind a layer that swallows it, nothing happens (nor on ``NOTHING``)."""
        x, new_state = frame_BCHW, []
        for layer, layer_state in zip(self.layers, state, strict=True):
            if x is not NOTHING:
                x, layer_state = layer.step(x, layer_state)
            new_state.append(layer_state)
        return x, tuple(new_state)

    def finish(self, state: tuple[Any, ...]) -> tuple[Any, ...]:
        """What each layer still owes goes through the ones behind it, before they end themselves."""
        late: list[Any] = []
        for layer, layer_state in zip(self.layers, state, strict=True):
            answers = []
            for x in late:
                answer, layer_state = layer.step(x, layer_state)
                answers += [] if answer is NOTHING else [answer]
            late = [*answers, *layer.finish(layer_state)]
        return tuple(late)

    def blank(self, frame_BCHW: Any) -> Any:
        for layer in self.layers:
            frame_BCHW = layer.blank(frame_BCHW)
        return frame_BCHW

    def forward(self, clip_BTCHW: Tensor) -> Any:
        x = clip_BTCHW
        for layer in self.layers:
            x = layer(x)
        return x


class Parallel(Steppable):
    """Branches side by side on the same frames; earlier answers wait for the longest delay.

    ``combine``: "sum", or "concat" along the channels (axis 1 of a frame's answer). All branches must swallow alike.
    State: (state of every branch, answers of every branch that wait for the others).
    """

    def __init__(self, *branches: Steppable, combine: str = "sum") -> None:
        super().__init__()
        if combine not in ("sum", "concat"):
            raise ModelError(f'{combine = } is unknown; give "sum" or "concat"')
        periods = {branch.period_ticks for branch in branches}
        if len(periods) != 1:
            raise ModelError(
                f"the branches of a Parallel answer every {[b.period_ticks for b in branches]} ticks, and must agree; "
                "give each the same temporal stride (for a skip path: Newest(stride))"
            )
        self.combine = combine
        self.branches = nn.ModuleList(branches)

    @property
    def delay_ticks(self) -> int:  # type: ignore[override]
        return max(branch.delay_ticks for branch in self._branches)

    @property
    def period_ticks(self) -> int:  # type: ignore[override]
        return self._branches[0].period_ticks

    def init_state(self, frame_BCHW: Tensor) -> tuple[Any, ...]:
        states = tuple(branch.init_state(frame_BCHW) for branch in self._branches)
        return states, ((),) * len(self._branches)

    def start(self, frame_BCHW: Any) -> tuple[tuple[Any, ...], Any]:
        states, blanks = zip(*(branch.start(frame_BCHW) for branch in self._branches))
        return (states, ((),) * len(self._branches)), self._combined(list(blanks), axis=1)

    def step(self, frame_BCHW: Tensor, state: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        states, queues = [], []
        for branch, branch_state, waiting in zip(self._branches, *state, strict=True):
            answer, branch_state = branch.step(frame_BCHW, branch_state)
            states.append(branch_state)
            queues.append(waiting if answer is NOTHING else (*waiting, answer))
        if all(queues):
            answer = self._combined([queue[0] for queue in queues], axis=1)
            queues = [queue[1:] for queue in queues]
        else:
            answer = NOTHING
        kept = tuple(_own(queue, old) for queue, old in zip(queues, state[1], strict=True))
        return answer, (tuple(states), kept)

    def finish(self, state: tuple[Any, ...]) -> tuple[Any, ...]:
        owed = [(*waiting, *branch.finish(s)) for branch, s, waiting in zip(self._branches, *state, strict=True)]
        if len({len(answers) for answers in owed}) != 1:
            raise LayoutError(
                f"at the end of the stream the branches owe {[len(answers) for answers in owed]} answers, so their "
                "clip forms differ in length; give each the padding that keeps the number of frames"
            )
        return tuple(self._combined(list(answers), axis=1) for answers in zip(*owed, strict=True))

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self._combined([branch(clip_BTCHW) for branch in self._branches], axis=2)

    def blank(self, frame_BCHW: Tensor) -> Tensor:
        return self._combined([branch.blank(frame_BCHW) for branch in self._branches], axis=1)

    @property
    def _branches(self) -> tuple[Steppable, ...]:
        return tuple(self.branches)  # type: ignore[arg-type]

    def _combined(self, answers: list[Tensor], axis: int) -> Tensor:
        shapes = [list(a.shape) for a in answers]
        compared = [s[:axis] + s[axis + 1 :] for s in shapes] if self.combine == "concat" else shapes
        if any(s != compared[0] for s in compared):
            raise LayoutError(f"the branches answer with the shapes {shapes}, which cannot be joined by {self.combine}")
        if self.combine == "concat":
            return torch.cat(answers, dim=axis)
        total = answers[0]
        for answer in answers[1:]:
            total = total + answer
        return total


class Residual(Steppable):
    """``skip(x) + body(x)``; the skip path is delayed to match the body's delay.

    ``shortcut``: the skip path; None: the frame itself. A body that swallows frames needs one that swallows alike.
    """

    def __init__(self, body: Steppable, shortcut: Steppable | None = None) -> None:
        super().__init__()
        if shortcut is None and body.period_ticks != 1:
            raise ModelError(
                f"the body of a Residual answers every {body.period_ticks} ticks, its skip path every tick; "
                f"give shortcut=Newest({body.period_ticks}), or a strided projection"
            )
        self.paths = Parallel(PerFrame(nn.Identity()) if shortcut is None else shortcut, body)

    @property
    def delay_ticks(self) -> int:  # type: ignore[override]
        return self.paths.delay_ticks

    @property
    def period_ticks(self) -> int:  # type: ignore[override]
        return self.paths.period_ticks

    def init_state(self, frame_BCHW: Tensor) -> Any:
        return self.paths.init_state(frame_BCHW)

    def start(self, frame_BCHW: Any) -> tuple[Any, Any]:
        return self.paths.start(frame_BCHW)

    def step(self, frame_BCHW: Tensor, state: Any) -> tuple[Any, Any]:
        return self.paths.step(frame_BCHW, state)

    def finish(self, state: Any) -> tuple[Any, ...]:
        return self.paths.finish(state)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self.paths(clip_BTCHW)

    def blank(self, frame_BCHW: Tensor) -> Tensor:
        return self.paths.blank(frame_BCHW)


def _own(queue: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copies of what waits anew: a frame, or an answer that shares memory with it, may be changed by its owner."""
    return tuple(x if any(x is y for y in old) else x.clone() for x in queue)
