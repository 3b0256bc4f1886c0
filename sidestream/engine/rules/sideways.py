"""Sideways: every stage goes forward and back in every tick, on its newest input, and keeps nothing.

Malinowski, Swirszcz, Carreira and Patraucean, "Sideways: Depth-Parallel Training of Video Models", CVPR 2020. On a
circuit with skip wires (``parallel(stages_of(modules, frame, skips="add"))``) it is Skip-Sideways: Malinowski et al.,
"Gradient Forward-Propagation for Large-Scale Temporal Video Modelling", CVPR 2021.

    tick t, stage i:   out_i = H_i(in_i)                                  the newest input
                       gradient_i = cot_i . dH_i/dparameters at in_i      cot_i was sent by the readers in tick t - 1
                       cot_(i-1) = cot_i . dH_i/din at in_i               arrives in tick t + 1
                       in_i is overwritten
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sidestream.circuit.stage import State
from sidestream.circuit.wire import Circuit
from sidestream.engine.rules.loss_stage import Loss
from sidestream.engine.rules.place import Place
from sidestream.engine.rules.stage_backward import frames_of, summed, swallowed
from sidestream.engine.rules.trainer import OptimizerFactory, StageTrainer, Update
from sidestream.engine.rules.training import Observer, TrainingRule
from sidestream.engine.tick import SILENCE, Cell, Message


class Sideways(TrainingRule):
    """Approximate gradients without waiting and without memory; right where the input changes slowly.

    ``run(circuit, pairs, rule=Sideways(loss, optimizers=partial(torch.optim.SGD, lr=0.1)))`` with pairs
    ``(frame, target)``. With K stages in a row, the input of stage i is 2 (K - i) frames newer than its gradient, and
    every stage has a gradient from tick 2 (K - 1) on. A stage goes back, and is updated, only in a tick in which a
    cotangent of every stage that reads it is there; one that comes earlier waits, and the newest wins. What is in
    flight when the stream ends is dropped.

    ``loss(answer, target)``: a scalar. Parameters of a loss that is a module are not trained.
    ``optimizers``: makes one optimiser per stage; None: gradients are gathered, and nothing is stepped.
    ``update``: a step after every "tick" with a gradient, after every N (a number), at the end of the "clip" (the
    stream), or "manual"; always with the mean over the ticks that had a gradient.
    ``max_norm``: each stage's gradient is clipped to this norm before its step.
    ``target``: of the frame that the answer is about ("answered") or of the "newest"; then the last frames, which no
    newer one follows, are neither answered nor trained on.
    ``loss_delay``: 1 takes the loss one tick later, which makes all gaps 2 (K - i) + 1. PARTIME (Meloni et al., 2022)
    takes it in the same tick; the paper does not say.
    ``observe``: called with every ``StageGradient``.

    ``state_ticks``: over how many ticks a gradient crosses the state of a stage. With n, a stage keeps its last n
    inputs and the state before them, and in every tick with a cotangent goes forward again through them and the
    newest input, with the weights as they are, and back through all; the parameters get the gradient of all these
    steps, the stages before that of the newest input only. The stage may have no dropout.

    State is carried from tick to tick as a value; with ``state_ticks=0`` no gradient crosses it. A batch norm in train
    mode normalises by the frame (or batch of streams) at hand and updates its statistics at every forward, fill-up
    included (not when a stage goes forward again), in its own stage; put it into eval mode to freeze it (before
    cutting, for a model that is cut). Dropout draws from the one generator of the process, so with dropout "threads"
    does not repeat what "inline" does.
    """

    def __init__(
        self,
        loss: Loss,
        *,
        optimizers: OptimizerFactory | None = None,
        update: Update = "tick",
        max_norm: float | None = None,
        target: str = "answered",
        loss_delay: int = 0,
        observe: Observer | None = None,
        state_ticks: int = 0,
    ) -> None:
        super().__init__(
            loss,
            optimizers=optimizers,
            update=update,
            max_norm=max_norm,
            target=target,
            loss_delay=loss_delay,
            observe=observe,
            state_ticks=state_ticks,
        )

    def num_silent_ticks(self, circuit: Circuit) -> int:
        return 0

    def _num_averaged(self, trainer: StageTrainer) -> int:
        return trainer.num_gathered

    def _tick(self, cell: Cell, messages: Sequence[Message]) -> Sequence[Message]:
        place = self._places[cell.number - 1]
        given, back = place.split(messages)
        memory = cell.memory = cell.memory or _Memory([None] * len(back))
        for n, message in enumerate(back):
            if message is not SILENCE:
                memory.waiting[n] = message
        if swallowed([m.value for m in given]):
            return (SILENCE,) * len(cell.outbox)
        return self._work(cell, given, place)

    def _work(self, cell: Cell, given: Sequence[Message], place: Place) -> Sequence[Message]:
        memory: _Memory = cell.memory
        goes_back = place.takes_loss or (bool(place.read_by) and None not in memory.waiting)
        window_ticks = self._window_ticks(cell.stage)
        before = memory.window_before(cell.tick - window_ticks)
        state = cell.state
        done, cell.state = self._forward(cell, given, state, records=goes_back and not before)
        if window_ticks:
            memory.window.append((cell.tick, given, state))
        if swallowed(done.outputs):
            return (SILENCE,) * len(cell.outbox)
        outputs = done.messages()
        if not goes_back:
            return [*outputs, *(SILENCE,) * len(given)]
        if before:
            steps = [step_given for _, step_given, _ in memory.window]
            done = self._again(cell, steps, before[0][2], newest_only=True)
        if place.takes_loss:
            cotangents = {len(done.outputs) - 1: torch.ones_like(done.outputs[-1])}
            frames = (done.oldest, done.newest)
        else:
            waiting, memory.waiting = memory.waiting, [None] * len(memory.waiting)
            cotangents, frames = summed(place.outputs_read, waiting), frames_of(waiting)
        return [*outputs, *self._backward(cell, done, cotangents, frames)[-len(given) :]]


@dataclass(slots=True)
class _Memory:
    """What a cell keeps: the cotangents that have come, and its last steps as (tick, what came in, state before)."""

    waiting: list[Message | None]
    window: deque[tuple[int, Sequence[Message], State]] = field(default_factory=deque)

    def window_before(self, tick: int) -> deque[tuple[int, Sequence[Message], State]]:
        """The steps from ``tick`` on; earlier ones are dropped."""
        while self.window and self.window[0][0] < tick:
            self.window.popleft()
        return self.window
