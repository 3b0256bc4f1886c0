"""What goes into a machine: any iterable of frames, of tensors, or of the model's own arguments, as ticks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sidestream.circuit.ages import latency_ticks, mixes_ages
from sidestream.circuit.stage import flatten_inputs, like_example
from sidestream.circuit.wire import Circuit
from sidestream.clock import Clock
from sidestream.engine.tick import Fed
from sidestream.errors import InputError, LayoutError
from sidestream.types import NOTHING, Frame, InputSpec

_NO_MORE = object()
Tick = tuple[list[Any], Fed | None]
Prepare = InputSpec | Callable[[Frame], Any] | None


class Feed:
    """An iterator of ticks: ``(leaves of the model's input, what to remember of the frame)``.

    ``frames`` may hold ``Frame`` (turned into the model's input by ``prepare``), tensors BCHW (taken as they are),
    tuples (several positional inputs) or dicts (keyword inputs). When the stream ends and the circuit mixes frames
    of different ages, the last frame is repeated until every frame is answered. ``stop()`` ends it early. What the
    source or ``prepare`` raises ends the stream too, and is kept as ``failure`` until what is in flight is answered.

    With ``has_targets`` (training) the items are pairs ``(any of these, target)``, and a tick's last leaf is the
    target, whatever it is; a repeated frame has no target. ``num_silent_ticks``: ticks without a frame that follow.

    Tensors that the stream or a ``prepare`` function brings are copied, since several frames are inside at once and
    the source may write the next one into the same memory; with ``copies=False`` it must not.
    """

    def __init__(
        self,
        frames: Iterable[Any],
        circuit: Circuit,
        *,
        prepare: Prepare,
        clock: Clock,
        has_targets: bool = False,
        num_silent_ticks: int = 0,
        copies: bool = True,
    ) -> None:
        self._frames = iter(frames)
        self._copies = copies
        self._circuit = circuit
        self._prepare = prepare if prepare is not None else circuit.input_spec
        self._clock = clock
        self._is_stopped = False  # a plain flag: stop() may be called from a signal handler
        self.failure: Exception | None = None
        self._has_targets = has_targets
        self._num_silent = num_silent_ticks
        self._num_drain = latency_ticks(circuit) if mixes_ages(circuit) else 0
        self._last: list[Any] | None = None
        self.num_frames = 0
        """Frames taken from the stream and prepared."""
        self.wants_latency = bool(getattr(frames, "wants_latency", False))
        """Whether the source is live (or replayed as if), so that a frame that waits grows old."""
        self.may_read_ahead = hasattr(frames, "wants_latency") and not self.wants_latency
        """Whether a frame may be taken before there is room for it: from a file, not from an unknown source."""

    def stop(self) -> None:
        """End the stream after the frame at hand; what is in flight is still answered."""
        self._is_stopped = True

    @property
    def is_stopped(self) -> bool:
        return self._is_stopped

    def __iter__(self) -> Iterator[Tick]:
        return self

    def __next__(self) -> Tick:
        if not self._is_stopped:
            try:
                item = next(self._frames, _NO_MORE)
                if item is not _NO_MORE:
                    return self._tick(item)
            except StopIteration as error:  # from a prepare function: no end of the stream
                self.failure = RuntimeError("the prepare function raised StopIteration")
                self.failure.__cause__ = error
            except Exception as error:
                self.failure = error
            self._is_stopped = True
        if self._last is None or self._num_drain + self._num_silent <= 0:
            raise StopIteration
        if self._num_drain > 0:
            self._num_drain -= 1
            return [*self._last[:-1], NOTHING] if self._has_targets else self._last, None
        self._num_silent -= 1
        return [NOTHING] * len(self._last), None

    def _tick(self, item: Any) -> Tick:
        if not self._has_targets:
            return self._frame_tick(item)
        if not isinstance(item, tuple) or len(item) != 2:
            raise InputError(
                f"a training rule takes pairs (input, target), but the stream brought a {type(item).__name__}"
                f"{f' of {len(item)}' if isinstance(item, tuple) else ''}; for a clip with one label, repeat the "
                "label with each frame; several inputs go in as ((input, input), target)"
            )
        leaves, fed = self._frame_tick(item[0])
        target = pytree.tree_map(_copied, item[1]) if self._copies else item[1]
        self._last = [_trainable(leaf) for leaf in (*leaves, target)]
        return self._last, fed

    def _frame_tick(self, item: Any) -> Tick:
        position = self.num_frames
        if isinstance(item, Frame):
            arrived_at = self._clock.now() if item.arrived_at_seconds is None else item.arrived_at_seconds
            fed = Fed(item.index, item.pts_seconds, arrived_at, item)
            leaves = self._leaves(self._prepared(item), copies=self._copies and callable(self._prepare))
        else:
            fed = Fed(position, math.nan, self._clock.now(), None)
            leaves = self._leaves(item, copies=self._copies)
        self._last, self.num_frames = leaves, position + 1
        return leaves, fed

    def _prepared(self, frame: Frame) -> Any:
        if self._prepare is None:
            return frame.image_BCHW
        if isinstance(self._prepare, InputSpec):
            from sidestream.video.prepare import prepare

            return prepare(frame, self._prepare)
        with torch.inference_mode(not self._has_targets), torch.no_grad():
            return self._prepare(frame)

    def _leaves(self, item: Any, *, copies: bool) -> list[Any]:
        spec, example = self._circuit.in_spec, self._circuit.example
        if isinstance(item, Tensor):
            if spec.num_leaves != 1:
                raise LayoutError(
                    f"the model takes {spec.num_leaves} inputs, but the stream brings one tensor per tick; "
                    "give tuples or dicts, or prepare= a function from Frame to the model's arguments"
                )
            return like_example([item], example, copies=copies)
        if isinstance(item, tuple):
            return flatten_inputs(spec, item, {}, example, copies=copies)
        if isinstance(item, dict):
            return flatten_inputs(spec, (), item, example, copies=copies)
        if isinstance(item, list) and example is not None and [type(a) for a in example[0]] == [list]:
            return flatten_inputs(spec, (item,), {}, example, copies=copies)  # the model's only argument is a list
        raise InputError(
            f"a stream item is a {type(item).__name__}; expected Frame, a tensor BCHW, a tuple of inputs or a dict"
        )


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _trainable(leaf: Any) -> Any:
    """A tensor that autograd may keep: not one from ``torch.inference_mode``."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf
