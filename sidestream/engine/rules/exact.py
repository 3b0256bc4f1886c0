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

import torch
from torch import nn

from sidestream.circuit.ages import latency_ticks
from sidestream.circuit.stage import Stage, State
from sidestream.circuit.wire import Circuit
from sidestream.engine.rules.loss_stage import Loss
from sidestream.engine.rules.place import Place
from sidestream.engine.rules.stage_backward import NO_GRADIENT, Work, summed, swallowed
from sidestream.engine.rules.trainer import OptimizerFactory, StageTrainer, Update
from sidestream.engine.rules.training import Frames, Observer, TrainingRule, frames_of
from sidestream.engine.tick import SILENCE, Cell, Message
from sidestream.errors import CircuitError, InputError

KEEP = ("graph", "inputs", "inputs and weights")


@dataclass(slots=True)
class _Kept:
    """A tick that waits for its replies. ``done`` or ``given``: by what is kept; neither where nothing was written."""

    tick: int
    done: Work | None = None
    given: Sequence[Message] = ()
    state: State = None
    weights: tuple[torch.Tensor, ...] = ()


class _Memory:
    """What a cell keeps: its ticks without a reply, oldest first, and replies that wait for those of other readers."""

    def __init__(self, num_readers: int) -> None:
        self.ticks: deque[_Kept] = deque()
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

    The stream is followed by ticks without a frame until all gradients have come back. No gradient crosses the state
    of a stage.
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
    ) -> None:
        super().__init__(
            loss,
            optimizers=optimizers,
            update=update,
            max_norm=max_norm,
            target=target,
            loss_delay=0,
            observe=observe,
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
        if self.keep != "graph":
            for number, stage in enumerate(circuit.stages, start=1):
                _check_repeatable(number, stage)

    def num_silent_ticks(self, circuit: Circuit) -> int:
        return latency_ticks(circuit) + circuit.num_stages

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
        nothing = _Kept(cell.tick), (SILENCE,) * cell.stage.num_outputs
        if swallowed([m.value for m in given]):
            return nothing
        keeps_graph = self.keep == "graph" or not place.read_by
        state = cell.state
        done, cell.state = self._forward(cell, given, state, records=keeps_graph)
        if swallowed(done.outputs):
            return nothing
        if keeps_graph:
            return _Kept(cell.tick, done), done.messages()
        return _Kept(cell.tick, None, given, state, self._weights(cell)), done.messages()

    def _go_back(self, cell: Cell, place: Place) -> Sequence[Message]:
        complete = cell.memory.complete()
        if complete is None:
            return (SILENCE,) * len(place.reads)
        kept, replies = complete
        sent: Sequence[Message] = [Message(NO_GRADIENT)] * len(place.reads)
        if place.takes_loss:
            if kept.done is not None:
                self._num_losses += 1
                seed = {len(kept.done.outputs) - 1: torch.ones_like(kept.done.outputs[-1])}
                sent = self._backward(cell, kept.done, seed, (kept.done.oldest, kept.done.newest))
        elif (kept.done or kept.given) and (totals := summed(place.outputs_read, replies)):
            frames = frames_of(replies)
            if kept.done is not None:
                sent = self._backward(cell, kept.done, totals, frames)
            else:
                sent = self._replay(cell, kept, totals, frames)
        return [SILENCE if kept.tick < w.delay else m for w, m in zip(place.reads, sent, strict=True)]

    def _replay(self, cell: Cell, kept: _Kept, totals: dict[int, torch.Tensor], frames: Frames) -> list[Message]:
        """Forward again from a kept input, and the product there."""
        with _Lent(self._trainer(cell), kept.weights):
            done, _ = self._forward(cell, kept.given, kept.state, records=True)
            gradients, sent = self._product(cell, done, totals)
        self._gather(cell, done, gradients, frames)
        return [Message(value, *frames) for value in sent]

    def _weights(self, cell: Cell) -> tuple[torch.Tensor, ...]:
        """The weights as they are; the same copy until the next update."""
        trainer = self._trainer(cell)
        if self.keep != "inputs and weights" or trainer is None:
            return ()
        if cell.memory.weights[0] != trainer.num_updates:
            copies = tuple(p.detach().clone() for p in trainer.parameters.values())
            cell.memory.weights = (trainer.num_updates, copies)
        return cell.memory.weights[1]


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


def _check_repeatable(number: int, stage: Stage) -> None:
    """CircuitError where a second forward would not repeat the first."""
    modules = list(stage.module.modules()) if stage.module is not None else []
    norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    drops = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0 for m in modules)
    drops = drops or any(isinstance(m, torch.fx.GraphModule) and _has_dropout(m) for m in modules)
    if stage.hides_state or norms or drops:
        what = "draws random numbers (dropout)" if drops else "updates statistics (batch norm in train mode)"
        raise CircuitError(
            f"stage {number} ({stage.name}) {what}, so going forward a second time would not repeat the first; "
            "use keep='graph', or put those layers into eval mode"
        )


def _has_dropout(graph_module: torch.fx.GraphModule) -> bool:
    """Dropout that was traced in train mode: ``aten.dropout(x, p, True)``."""
    nodes = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)
    return any(bool(node.args[2]) and node.args[1] > 0 for node in nodes)
