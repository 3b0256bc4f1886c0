"""Stages of modules that are called as they are (layers of a ``Chain``, stages made by hand): what these keep between
calls in buffers, and whether they draw random numbers, is found by trying them, and declared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.circuit.same import same_tensor
from sidestream.circuit.stage import Stage, State, Values
from sidestream.circuit.step import HeldBuffers

Buffer = tuple[nn.Module, str]
Step = Callable[[Values, State], tuple[Values, State]]


@dataclass(frozen=True)
class Buffered:
    """The state of a ``BufferedStep``."""

    own: State
    buffers: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class BufferedStep:
    """A step whose modules write to buffers. With a ``Buffered`` state it works on that one's; else, in training, on
    the modules' own."""

    inner: Step
    held: HeldBuffers

    def __call__(self, inputs: Values, state: State) -> tuple[Values, State]:
        if not isinstance(state, Buffered):
            return self.inner(inputs, state)
        with self.held.lent(state.buffers) as after:
            outputs, own = self.inner(inputs, state.own)
        kept = {id(buffer) for buffer in after()}
        outputs = tuple(v.clone() if isinstance(v, Tensor) and id(v) in kept else v for v in outputs)
        return outputs, Buffered(own, after())

    def with_gradients(self, inputs: Values, state: State) -> tuple[Values, State]:
        """The inner step in the caller's gradient mode: what training calls."""
        return getattr(self.inner, "with_gradients", self.inner)(inputs, state)


class Watched:
    """A stage that is tried out, and what its calls did besides answering."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.written: dict[Buffer, None] = {}
        self.draws = False

    def watching(self) -> Stage:
        """The stage with an eye on it."""
        return replace(self.stage, step=self._step)

    def declared(self) -> Stage:
        """The stage that says what it does."""
        if not self.written:
            return replace(self.stage, draws=self.draws)
        step, held = self.stage.step, HeldBuffers(tuple(self.written))
        init, finish = self.stage.init_state, self.stage.finish
        return replace(
            self.stage,
            step=BufferedStep(step, held),
            hides_state=True,
            init_buffers=lambda: Buffered(None if init is None else init(), held.copies()),
            finish=None if finish is None else _Finish(finish, held),
            draws=self.draws,
        )

    def _step(self, inputs: Values, state: State) -> tuple[Values, State]:
        random_state, buffers = torch.get_rng_state(), _buffers_of(self.stage.module)
        answer = self.stage.step(inputs, state)
        self.draws = self.draws or not torch.equal(random_state, torch.get_rng_state())
        for (owner, name), (buffer, before) in buffers.items():
            now = owner._buffers.get(name)
            if now is not buffer or not same_tensor(buffer, before):
                self.written[owner, name] = None
        return answer


@dataclass(frozen=True, eq=False)
class _Finish:
    """``finish`` of a stage with buffers."""

    inner: Callable[[State], Iterable[Values]]
    held: HeldBuffers

    def __call__(self, state: State) -> Any:
        if not isinstance(state, Buffered):
            return self.inner(state)
        lent: AbstractContextManager[Any] = self.held.lent(state.buffers)
        with lent:
            return list(self.inner(state.own))


def _buffers_of(module: Any) -> dict[Buffer, tuple[Tensor, Tensor]]:
    if not isinstance(module, nn.Module):
        return {}
    found = {(m, name): b for m in module.modules() for name, b in m._buffers.items() if b is not None}
    return {key: (buffer, buffer.detach().clone()) for key, buffer in found.items()}
