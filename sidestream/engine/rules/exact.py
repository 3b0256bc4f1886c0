"""Exact gradients by pipelining: a stage keeps each input until that input's own gradient has come back.

Huang et al., "GPipe", 2019, and Narayanan et al., "PipeDream", 2019, on this machine: a frame is a micro-batch; every
tick of a stage is one forward and one backward (1F1B), so in a row of K stages stage i keeps 2 (K - i) + 1 inputs.

    tick t, stage i:   out_i = H_i(in_i), and in_i is kept
                       once all readers have replied to what was written in tick s: the product at in_i of tick s,
                       its cotangents are the replies to the stages before, and in_i of tick s is dropped

A reply names no frame: every reader replies once to every value, in order, so the k-th reply on a line is about the
k-th value. What had no gradient is replied to with ``NO_GRADIENT``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sidestream.circuit.ages import latency_ticks
from sidestream.circuit.stage import State
from sidestream.circuit.wire import Circuit
from sidestream.engine.rules.loss_stage import Loss
from sidestream.engine.rules.place import Place, check_repeatable
from sidestream.engine.rules.stage_backward import NO_GRADIENT, Frames, Work, frames_of, summed, swallowed
from sidestream.engine.rules.trainer import OptimizerFactory, StageTrainer, Update
from sidestream.engine.rules.training import Observer, TrainingRule
from sidestream.engine.tick import SILENCE, Cell, Message
from sidestream.errors import InputError

KEEP = ("graph", "inputs", "inputs and weights")


@dataclass(slots=True)
class _Kept:
    """A tick that waits for its replies. ``done`` or ``given``: by what is kept; neither if the stage did nothing."""

    tick: int
    done: Work | None = None
    given: Sequence[Message] | None = None
    state: State = None
    weights: tuple[torch.Tensor, ...] = ()
    is_silent: bool = False
    """Whether the stage wrote nothing in it."""
    sent: Sequence[Message] | None = None
    """The replies to its inputs, as far as they have been gathered."""

    def add(self, cotangents: Sequence[Any], frames: Frames) -> None:
        """Sum up what goes back to this tick's inputs."""
        sent = self.sent or [Message(NO_GRADIENT)] * len(cotangents)
        self.sent = [_added(message, value, frames) for message, value in zip(sent, cotangents, strict=True)]


class _Memory:
    """What a cell keeps: its ticks without a reply, oldest first, and replies that wait for those of other readers."""

    def __init__(self, num_readers: int) -> None:
        self.ticks: deque[_Kept] = deque()
        self.past: deque[_Kept] = deque()
        """Ticks with all replies to them, whose inputs later ones still read through the state."""
        self.replies: list[deque[Message]] = [deque() for _ in range(num_readers)]
        self.weights: tuple[int, tuple[torch.Tensor, ...]] = (-1, ())
        """Number of updates and copy of the weights, as last kept."""

    def take(self, back: Sequence[Message]) -> None:
        for line, message in zip(self.replies, back, strict=True):
            if message is not SILENCE:
                line.append(message)

    def complete(self) -> tuple[_Kept, list[Message]] | None:
        """The oldest tick with all replies to it, if they are in."""
        if not self.ticks or not all(self.replies):
            return None
        return self.ticks.popleft(), [line.popleft() for line in self.replies]


class Exact(TrainingRule):
    """Gradients of the circuit as it ran, equal to autograd's through all of its ticks, on any wiring.

    On ``pipelined`` and ``sequential`` circuits these are the model's own gradients, frame by frame. Arguments as for
    ``Sideways``, and:

    ``keep``: "graph" keeps what autograd has recorded (weights must not change in between, so ``update`` is "clip" or
    "manual": GPipe). "inputs" keeps inputs only and goes forward a second time (recomputation), with the weights as
    they are by then. "inputs and weights" does so with the weights of the first time (weight stashing, PipeDream); a
    copy of the weights is kept per update in flight. Where no update comes between, all three agree.

    Over a clip ("clip", "manual") gradients are divided by the number of losses: the gradient of the mean loss.

    The stream is followed by ticks without a frame until all gradients have come back.

    ``state_ticks``: over how many ticks a gradient crosses the state of a stage. With n, the gradients are autograd's
    of the circuit in which what a stage writes in tick s is a function of its inputs of ticks s - n to s, and of its
    state before them as a constant: with 0 nothing crosses, and from the length of the clip on this is
    back-propagation through time. A stage with a state replies n ticks later, when all that its input has reached is
    known, and goes forward again n + 1 times and back through them for every tick: with the weights as they are, or
    under "inputs and weights" as they were in tick s. It may have no dropout.
    """

    def __init__(
        self,
        loss: Loss,
        *,
        optimizers: OptimizerFactory | None = None,
        update: Update = "clip",
        max_norm: float | None = None,
        keep: str = "graph",
        target: str = "answered",
        observe: Observer | None = None,
        state_ticks: int = 0,
    ) -> None:
        super().__init__(
            loss,
            optimizers=optimizers,
            update=update,
            max_norm=max_norm,
            target=target,
            loss_delay=0,
            observe=observe,
            state_ticks=state_ticks,
        )
        if keep not in KEEP:
            raise InputError(f"{keep = }; expected one of {', '.join(map(repr, KEEP))}")
        if keep == "graph" and update not in ("clip", "manual") and optimizers is not None:
            raise InputError(
                f"{update = } changes weights that a kept graph still needs; use update='clip' or 'manual', or "
                "keep='inputs' (weights as they are by then) or 'inputs and weights' (those of the forward pass)"
            )
        self.keep = keep

    def _check(self, circuit: Circuit) -> None:
        super()._check(circuit)
        if self.keep != "graph":
            for number, stage in enumerate(circuit.stages, start=1):
                check_repeatable(number, stage, "use keep='graph', or put those layers into eval mode")

    def num_silent_ticks(self, circuit: Circuit) -> int:
        waits = sum(self._window_ticks(stage) for stage in circuit.stages)
        return latency_ticks(circuit) + circuit.num_stages + waits

    def _num_averaged(self, trainer: StageTrainer) -> int:
        """The losses: where ages mix, a stage may have gradients in more ticks than there are losses."""
        return self._num_losses

    def _tick(self, cell: Cell, messages: Sequence[Message]) -> Sequence[Message]:
        place = self._places[cell.number - 1]
        given, back = place.split(messages)
        if cell.memory is None:
            cell.memory = _Memory(len(back))
        kept, outputs = self._go_forward(cell, given, place)
        cell.memory.ticks.append(kept)
        cell.memory.take(back)
        return [*outputs, *self._go_back(cell, place)]

    def _go_forward(self, cell: Cell, given: Sequence[Message], place: Place) -> tuple[_Kept, Sequence[Message]]:
        nothing = (SILENCE,) * cell.stage.num_outputs
        if swallowed([m.value for m in given]):
            return _Kept(cell.tick, is_silent=True), nothing
        looks_back = self._window_ticks(cell.stage) > 0
        keeps_graph = not looks_back and (self.keep == "graph" or not place.read_by)
        state = cell.state
        done, cell.state = self._forward(cell, given, state, records=keeps_graph)
        is_silent = swallowed(done.outputs)
        if is_silent and not looks_back:
            return _Kept(cell.tick, is_silent=True), nothing
        if keeps_graph:
            return _Kept(cell.tick, done), done.messages()
        kept = _Kept(cell.tick, None, given, state, self._weights(cell), is_silent)
        return kept, nothing if is_silent else done.messages()

    def _go_back(self, cell: Cell, place: Place) -> Sequence[Message]:
        """The product at the oldest tick with all its replies; the replies to the inputs that nothing more reaches."""
        complete, past = cell.memory.complete(), cell.memory.past
        if complete is None:
            return (SILENCE,) * len(place.reads)
        kept, replies = complete
        past.append(kept)
        if not kept.is_silent:
            self._take_product(cell, place, kept, replies)
        if len(past) <= self._window_ticks(cell.stage):
            return (SILENCE,) * len(place.reads)
        final = past.popleft()
        sent = final.sent or [Message(NO_GRADIENT)] * len(place.reads)
        return [SILENCE if final.tick < w.delay else m for w, m in zip(place.reads, sent, strict=True)]

    def _take_product(self, cell: Cell, place: Place, kept: _Kept, replies: Sequence[Message]) -> None:
        if place.takes_loss:
            self._num_losses += 1
        elif not (totals := summed(place.outputs_read, replies)):
            return
        window = [kept] if kept.done else [each for each in cell.memory.past if each.given is not None]
        with _Lent(self._trainer(cell), kept.weights):
            steps = [each.given for each in window if each.given is not None]
            done = kept.done or self._again(cell, steps, window[0].state, newest_only=False)
            frames = (done.oldest, done.newest) if place.takes_loss else frames_of(replies)
            if place.takes_loss:
                totals = {len(done.outputs) - 1: torch.ones_like(done.outputs[-1])}
            gradients, sent = self._product(cell, done, totals)
        self._gather(cell, done, gradients, frames)
        num_inputs = len(place.reads)
        for n, each in enumerate(window):
            each.add(sent[n * num_inputs : (n + 1) * num_inputs], frames)

    def _weights(self, cell: Cell) -> tuple[torch.Tensor, ...]:
        """The weights as they are; the same copy until the next update."""
        trainer = self._trainer(cell)
        if self.keep != "inputs and weights" or trainer is None:
            return ()
        if cell.memory.weights[0] != trainer.num_updates:
            copies = tuple(p.detach().clone() for p in trainer.parameters.values())
            cell.memory.weights = (trainer.num_updates, copies)
        return cell.memory.weights[1]


def _added(message: Message, value: Any, frames: Frames) -> Message:
    """``message`` and one more cotangent; each with the frames that it is about."""
    if value is NO_GRADIENT:
        return message
    if message.value is NO_GRADIENT:
        return Message(value, *frames)
    return Message(message.value + value, *frames_of([message, Message(None, *frames)]))


class _Lent:
    """While inside, a stage's parameters have earlier values; nobody else works on that stage meanwhile."""

    def __init__(self, trainer: StageTrainer | None, weights: tuple[torch.Tensor, ...]) -> None:
        self.parameters = list(trainer.parameters.values()) if trainer and weights else []
        self.weights = weights

    def __enter__(self) -> None:
        self.current = [p.data for p in self.parameters]
        for parameter, weight in zip(self.parameters, self.weights):
            parameter.data = weight

    def __exit__(self, *exc: object) -> None:
        for parameter, data in zip(self.parameters, self.current):
            parameter.data = data
