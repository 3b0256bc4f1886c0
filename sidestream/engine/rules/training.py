"""What the training rules share: the circuit with its loss, one trainer per stage, and the record of every gradient."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sidestream.circuit.stage import Stage, State
from sidestream.circuit.wire import Circuit
from sidestream.engine.rules.forward import naming
from sidestream.engine.rules.loss_stage import Loss, with_loss
from sidestream.engine.rules.place import Place, check_repeatable, parameters_of, places_of, undisturbed_statistics
from sidestream.engine.rules.stage_backward import Frames, Gradients, Work, frames_of, pull_back, work, work_through
from sidestream.engine.rules.trainer import OptimizerFactory, StageTrainer, Update, check_update
from sidestream.engine.tick import Cell, LineBack, Message, against_wires
from sidestream.errors import CircuitError, InputError, StageError


@dataclass(frozen=True, slots=True)
class StageGradient:
    """One gradient of one stage, as an observer sees it, before any update is made with it."""

    stage: int
    """Number of the stage, from 1."""
    tick: int
    """The stage's own count of ticks, from 0."""
    input_frame: int | None
    """Oldest frame in the input at which the product was taken."""
    cotangent_frame: int | None
    """Oldest frame in the answers that the cotangents are about."""
    gradients: Gradients
    """By name of the parameter, of this tick alone, not clipped. They must not be changed."""

    @property
    def age_gap(self) -> int | None:
        """By how many frames the input is newer than its gradient: 2 (K - stage) under Sideways, 0 under Exact."""
        if self.input_frame is None or self.cotangent_frame is None:
            return None
        return self.input_frame - self.cotangent_frame


Observer = Callable[[StageGradient], None]
"""Called in the thread that works on the stage, so from several at once under the executor "threads"."""


class TrainingRule(ABC):
    """A rule that goes back. It is made once, and run clip after clip on the circuits of one set of stages."""

    goes_back = True

    def __init__(
        self,
        loss: Loss,
        *,
        optimizers: OptimizerFactory | None,
        update: Update,
        max_norm: float | None,
        target: str,
        loss_delay: int,
        observe: Observer | None,
        state_ticks: int = 0,
    ) -> None:
        check_update(update, max_norm)
        if not (type(state_ticks) is int and state_ticks >= 0):
            raise InputError(f"{state_ticks = }; expected a number of ticks from 0 on (0: no gradient crosses a state)")
        self.update, self.state_ticks = update, state_ticks
        self._loss, self._target, self._loss_delay, self._observe = loss, target, loss_delay, observe
        self._optimizers, self._max_norm = optimizers, max_norm
        self._stages: tuple[Stage, ...] = ()
        self._trainers: tuple[StageTrainer, ...] = ()
        self._places: tuple[Place, ...] = ()
        self._num_losses = 0

    @abstractmethod
    def _tick(self, cell: Cell, messages: Sequence[Message]) -> Sequence[Message]:
        """One tick of one stage: forward, back, and the update where one is due."""

    def _check(self, circuit: Circuit) -> None:
        """Raises CircuitError for stages that the rule cannot train."""
        for number, stage in enumerate(circuit.stages, start=1):
            if self._window_ticks(stage):
                what = "use state_ticks=0, or put those layers into eval mode"
                check_repeatable(number, stage, what, statistics_matter=False)

    def _window_ticks(self, stage: Stage) -> int:
        """Over how many earlier ticks a gradient of this stage goes back; 0 for one without a state."""
        return self.state_ticks if stage.init_state is not None else 0

    @abstractmethod
    def num_silent_ticks(self, circuit: Circuit) -> int:
        """Ticks without a frame that the rule needs at the end of a stream."""

    @abstractmethod
    def _num_averaged(self, trainer: StageTrainer) -> int:
        """By what the gradients gathered over a clip are divided."""

    def lines_back(self, circuit: Circuit) -> Sequence[LineBack]:
        return against_wires(circuit)

    def fire(self, cell: Cell, messages: Sequence[Message]) -> Sequence[Message]:
        started = time.perf_counter()
        outgoing = self._tick(cell, messages)
        cell.busy_seconds += time.perf_counter() - started
        return outgoing

    def finish(self, cell: Cell) -> Sequence[Sequence[Message]]:
        """The stream of a cell has ended."""
        if self.update == "clip" and (trainer := self._trainer(cell)) is not None:
            with naming(cell, frame_index=None):
                trainer.step(self._num_averaged(trainer))
        return []

    def attach(self, circuit: Circuit) -> Circuit:
        """Make ready to train ``circuit``; gives the circuit with the loss in it. ``run`` calls it at its start.

        Trainers and optimisers are made for the first circuit, and kept for all later ones of the same stages.
        """
        self._check(circuit)
        full = with_loss(circuit, self._loss, target=self._target, loss_delay=self._loss_delay)
        if not self._stages:
            self._trainers = tuple(
                StageTrainer(own, optimizers=self._optimizers, update=self.update, max_norm=self._max_norm)
                for own in parameters_of(circuit.stages)
            )
            self._stages = circuit.stages
        elif len(circuit) != len(self._stages) or any(a is not b for a, b in zip(circuit.stages, self._stages)):
            raise CircuitError("this rule already trains the stages of another circuit; make a new rule for this one")
        self._places = places_of(full)
        if self.update == "clip":  # what a run that was cut short has left
            self.zero_gradients()
        return full

    def gradients(self, stage: int) -> Gradients:
        """Gradient of each parameter of a stage (numbered from 1), by name: the mean that the last update was made
        with; under "manual" the mean of what has been gathered since."""
        trainer = self._of_stage(stage)
        return trainer.mean(self._num_averaged(trainer)) if self.update == "manual" else dict(trainer.latest)

    @property
    def optimizers(self) -> tuple[Optimizer | None, ...]:
        """One per stage (for schedules of the learning rate); None where a stage has no parameters."""
        return tuple(trainer.optimizer for trainer in self._trainers)

    @property
    def num_updates(self) -> tuple[int, ...]:
        """Updates made so far, per stage."""
        return tuple(trainer.num_updates for trainer in self._trainers)

    def step(self) -> None:
        """Update every stage with what it has gathered. Between runs only."""
        for trainer in self._trainers:
            trainer.step(self._num_averaged(trainer))
        self._num_losses = 0

    def zero_gradients(self) -> None:
        """Forget what has been gathered since the last update. Between runs only."""
        for trainer in self._trainers:
            trainer.zero()
        self._num_losses = 0

    def assign_gradients(self) -> None:
        """Put ``gradients(stage)`` into ``parameter.grad``, for an optimiser outside. Between runs only."""
        for number, trainer in enumerate(self._trainers, start=1):
            found = self.gradients(number)
            for name, parameter in trainer.parameters.items():
                parameter.grad = found.get(name)

    def state_dict(self) -> dict[str, Any]:
        """Optimiser states and gathered gradients of all stages: plain values and tensors."""
        stages = [trainer.state_dict() for trainer in self._trainers]
        return {"stages": stages, "num_losses": self._num_losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; after ``attach``."""
        if len(state["stages"]) != len(self._trainers):
            raise InputError(
                f"the saved state is of {len(state['stages'])} stages, but this rule trains {len(self._trainers)}; "
                "call attach(circuit) first, with the circuit of the saved run"
            )
        for trainer, saved in zip(self._trainers, state["stages"], strict=True):
            trainer.load_state_dict(saved)
        self._num_losses = state["num_losses"]

    def _of_stage(self, stage: int) -> StageTrainer:
        if not 1 <= stage <= len(self._trainers):
            have = f"stages 1 to {len(self._trainers)}" if self._trainers else "none before its first run"
            raise InputError(f"there is no stage {stage}; this rule trains {have}")
        return self._trainers[stage - 1]

    def _trainer(self, cell: Cell) -> StageTrainer | None:
        """The trainer of a cell; None for a loss that is a stage of its own."""
        return self._trainers[cell.number - 1] if cell.number <= len(self._trainers) else None

    def _forward(self, cell: Cell, given: Sequence[Message], state: State, *, records: bool) -> tuple[Work, State]:
        """The cell's stage on what its lines brought; a loss must be finite."""
        place = self._places[cell.number - 1]
        frame = frames_of(given)[0]
        with naming(cell, frame_index=frame):
            done, state = work(place.step, given, state, wants=place.wants, records=records)
            if place.takes_loss:
                _check_loss(done, cell)
        return done, state

    def _again(self, cell: Cell, window: Sequence[Sequence[Message]], state: State, *, newest_only: bool) -> Work:
        """The cell's stage again on kept inputs, with the weights as they are and one graph through its state."""
        place = self._places[cell.number - 1]
        with naming(cell, frame_index=frames_of(window[-1])[0]), undisturbed_statistics(cell.stage.module):
            done = work_through(place.step, window, state, wants=place.wants, newest_only=newest_only)
            if place.takes_loss:
                _check_loss(done, cell)
        return done

    def _backward(self, cell: Cell, done: Work, cotangents: dict[int, Tensor], frames: Frames) -> list[Message]:
        """The product at ``done``, gathered by the trainer; one message per input. ``frames``: of the loss."""
        gradients, sent = self._product(cell, done, cotangents)
        self._gather(cell, done, gradients, frames)
        return [Message(value, *frames) for value in sent]

    def _product(self, cell: Cell, done: Work, cotangents: dict[int, Tensor]) -> tuple[Gradients, list[Any]]:
        trainer = self._trainer(cell)
        with naming(cell, frame_index=done.oldest):
            return pull_back(done, cotangents, trainer.parameters if trainer else {})

    def _gather(self, cell: Cell, done: Work, gradients: Gradients, frames: Frames) -> None:
        trainer = self._trainer(cell)
        if trainer is None or not gradients:
            return
        with naming(cell, frame_index=done.oldest):
            if self._observe is not None:
                self._observe(StageGradient(cell.number, cell.tick, done.oldest, frames[0], gradients))
            trainer.gather(gradients)


def _check_loss(done: Work, cell: Cell) -> None:
    loss = done.outputs[-1]
    if isinstance(loss, Tensor) and not torch.isfinite(loss):
        raise StageError(
            f"the loss of frame {done.oldest} (tick {cell.tick}) is {loss.item()}; nothing was updated with it. "
            "Lower the learning rate, clip gradients with max_norm, or look at that frame and its target"
        )
