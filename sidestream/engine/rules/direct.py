"""Direct feedback alignment: the error of the answer goes straight to every stage, over fixed random weights.

Nøkland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks", NeurIPS 2016. No cotangent runs from
stage to stage; a line of one tick leads from the stage that takes the loss to each of the others:

    tick t, last stage:   e = dloss/danswer at in_K                            e is written, and in_K overwritten
    tick t, stage i < K:  gradient_i = (B_i e) . dH_i/dparameters at in_i      e was written in tick t - 1

In a row of K stages the input of stage i is then K - i + 1 frames newer than its gradient (K - i for the way forward
and 1 for the line), where under Sideways it is 2 (K - i); and every stage has a gradient from tick K on, not 2 (K - 1).
Or an input is kept until its own error arrives: then the gap is 0, and K - i + 2 inputs are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sidestream.circuit.ages import lags_of, latency_ticks
from sidestream.circuit.stage import State
from sidestream.circuit.wire import Circuit
from sidestream.engine.rules.forward import naming
from sidestream.engine.rules.loss_stage import Loss
from sidestream.engine.rules.place import Place, check_repeatable
from sidestream.engine.rules.stage_backward import NO_GRADIENT, Work, swallowed
from sidestream.engine.rules.trainer import OptimizerFactory, StageTrainer, Update
from sidestream.engine.rules.training import Observer, TrainingRule
from sidestream.engine.tick import SILENCE, Cell, LineBack, Message
from sidestream.errors import CircuitError, InputError
from sidestream.nn.feedback_weights import Draw, ErrorFeedback

KEEP = ("nothing", "graph", "inputs")


class DirectFeedback(TrainingRule):
    """Gradients from B_i e in the place of a stage's true cotangent; the last stage has the true one.

    ``keep``: "nothing" takes the product at the newest input, as ``Sideways`` does. "graph" and "inputs" take it at
    the input that the error is about, which is kept until then, as ``Exact`` does: with what autograd recorded
    (``update`` is then "clip" or "manual"), or by going forward a second time with the weights as they are.
    ``seed``, ``distribution``, ``scale``: of the B_i, see ``nn.feedback_weights.Draw``; B_i is a dense matrix with a
    row for every number in the output of stage i and a column for every number in the answer, per item of the batch.

    All else is as for ``Sideways``; ``loss_delay=1`` takes the loss in a stage of its own, and the last stage of the
    model, as all others, has its error one tick later. Over a clip, kept gradients are divided by the number of
    losses, others by the ticks that had one. A stage with skip wires is no different from others: each of its outputs
    that a stage reads has a B e of its own, whoever reads it, and "the input that the error is about" is the one of
    the tick in which the stage worked on the answered frame. The answer must be one tensor, made by the last stage.
    """

    def __init__(
        self,
        loss: Loss,
        *,
        optimizers: OptimizerFactory | None = None,
        update: Update = "tick",
        max_norm: float | None = None,
        keep: str = "nothing",
        target: str = "answered",
        loss_delay: int = 0,
        observe: Observer | None = None,
        seed: int = 0,
        distribution: str = "uniform",
        scale: float | None = None,
    ) -> None:
        super().__init__(
            loss,
            optimizers=optimizers,
            update=update,
            max_norm=max_norm,
            target=target,
            loss_delay=loss_delay,
            observe=observe,
        )
        if keep not in KEEP:
            raise InputError(f"{keep = }; direct feedback keeps one of {', '.join(map(repr, KEEP))}")
        if keep == "graph" and update not in ("clip", "manual") and optimizers is not None:
            raise InputError(
                f"{update = } changes weights that a kept graph still needs; use update='clip' or 'manual', or "
                "keep='inputs' or 'nothing'"
            )
        self.keep = keep
        self._feedback = ErrorFeedback(Draw(seed, distribution, scale))
        self._lag = 0
        """Of the stage that takes the loss."""
        self._answer = 0
        """The output of the last stage that is the answer."""

    def _check(self, circuit: Circuit) -> None:
        super()._check(circuit)
        ends = circuit.wires_into(circuit.sink)
        if len(ends) != 1 or ends[0].source != circuit.num_stages:
            raise CircuitError(
                f"the answer has {len(ends)} parts, of stages {[w.source for w in ends]}; direct feedback needs an "
                f"answer that is one tensor, made by the last stage ({circuit.num_stages})"
            )
        if self.keep == "inputs":
            for number, stage in enumerate(circuit.stages, start=1):
                check_repeatable(number, stage, "use keep='graph' or 'nothing', or put those layers into eval mode")

    def attach(self, circuit: Circuit) -> Circuit:
        full = super().attach(circuit)
        self._places = tuple(replace(place, sends_back=place.takes_loss) for place in self._places)
        self._lag = lags_of(full)[len(full)]
        self._answer = circuit.wires_into(circuit.sink)[0].output
        return full

    def lines_back(self, circuit: Circuit) -> Sequence[LineBack]:
        """From the stage that takes the loss to all others."""
        K = circuit.num_stages
        return [LineBack(K, 0, number) for number in range(1, K)]

    def num_silent_ticks(self, circuit: Circuit) -> int:
        return 0 if self.keep == "nothing" else latency_ticks(circuit) + 1

    def _num_averaged(self, trainer: StageTrainer) -> int:
        return trainer.num_gathered if self.keep == "nothing" else self._num_losses

    def _tick(self, cell: Cell, messages: Sequence[Message]) -> Sequence[Message]:
        place = self._places[cell.number - 1]
        given = messages[: len(place.reads)]
        if place.takes_loss:
            return self._take_loss(cell, given)
        memory = cell.memory = cell.memory or _Memory()
        outputs = self._at_kept if self.keep != "nothing" else self._at_newest
        made = outputs(cell, given, messages[-1], memory)
        return [*made, *(SILENCE,) * len(place.reads)]

    def _take_loss(self, cell: Cell, given: Sequence[Message]) -> Sequence[Message]:
        """The last stage: its own gradient, and the error for all others."""
        nothing = (SILENCE,) * len(cell.outbox)
        if swallowed([m.value for m in given]):
            return nothing
        done, cell.state = self._forward(cell, given, cell.state, records=True)
        if swallowed(done.outputs):
            return nothing
        self._num_losses += 1
        frames = (done.oldest, done.newest)
        *own, loss = done.outputs
        with naming(cell, frame_index=done.oldest):
            error = _gradient(loss, own[self._answer] if own else done.inputs[0])
        if own and error is not NO_GRADIENT:
            gradients, _ = self._product(cell, done, {self._answer: error})
            self._gather(cell, done, gradients, frames)
        return [*done.messages(), Message(error, *frames), *(SILENCE,) * (len(given) - 1)]

    def _at_newest(self, cell: Cell, given: Sequence[Message], error: Message, memory: _Memory) -> Sequence[Message]:
        if error is not SILENCE:
            memory.error = error
        nothing = (SILENCE,) * cell.stage.num_outputs
        if swallowed([m.value for m in given]):
            return nothing
        goes_back = _has_value(memory.error)
        done, cell.state = self._forward(cell, given, cell.state, records=goes_back)
        if swallowed(done.outputs):
            return nothing
        error, memory.error = memory.error, SILENCE
        if goes_back:
            self._go_back(cell, done, error)
        return done.messages()

    def _at_kept(self, cell: Cell, given: Sequence[Message], error: Message, memory: _Memory) -> Sequence[Message]:
        outputs: Sequence[Message] = (SILENCE,) * cell.stage.num_outputs
        if not swallowed([m.value for m in given]):
            state = cell.state
            done, cell.state = self._forward(cell, given, state, records=self.keep == "graph")
            if not swallowed(done.outputs):
                outputs = done.messages()
                kept = _Kept(cell.tick, done) if self.keep == "graph" else _Kept(cell.tick, None, given, state)
                memory.kept.append(kept)
        about = cell.tick - 1 - (self._lag - cell.lag)
        while memory.kept and memory.kept[0].tick <= about:
            kept = memory.kept.popleft()
            if kept.tick == about and _has_value(error):
                done = kept.done or self._forward(cell, kept.given, kept.state, records=True)[0]
                self._go_back(cell, done, error)
        return outputs

    def _go_back(self, cell: Cell, done: Work, error: Message) -> None:
        """The product at ``done`` with B e as the cotangent of each output that a stage reads."""
        place: Place = self._places[cell.number - 1]
        cotangents: dict[int, Tensor] = {}
        with naming(cell, frame_index=done.oldest):
            for n in sorted(set(place.outputs_read)):
                output = done.outputs[n]
                if isinstance(output, Tensor) and output.requires_grad:
                    cotangents[n] = self._cotangent(cell.number, n, output.detach(), error.value)
        gradients, _ = self._product(cell, done, cotangents)
        self._gather(cell, done, gradients, (error.oldest, error.newest))

    def _cotangent(self, number: int, n: int, output: Tensor, error: Tensor) -> Tensor:
        if number == len(self._stages) and n == self._answer:  # read by the loss, which is a stage of its own
            return error
        return self._feedback.cotangent(f"stage {number}, output {n}", output, error)


@dataclass(slots=True)
class _Kept:
    """A tick that waits for its error, by its graph or by what came in."""

    tick: int
    done: Work | None = None
    given: Sequence[Message] = ()
    state: State = None


@dataclass(slots=True)
class _Memory:
    """What a cell keeps: the newest error that it has not used, or its inputs without an error, oldest first."""

    error: Message = SILENCE
    kept: deque[_Kept] = field(default_factory=deque)


def _has_value(error: Message) -> bool:
    return error is not SILENCE and error.value is not NO_GRADIENT


def _gradient(loss: Tensor, answer: Any) -> Any:
    """dloss / danswer; the graph stays."""
    if not (isinstance(answer, Tensor) and answer.requires_grad):
        return NO_GRADIENT
    with torch.inference_mode(False):
        found = torch.autograd.grad(loss, answer, retain_graph=True, allow_unused=True)[0]
    return NO_GRADIENT if found is None else found
