"""The rule "unrolled": nets trained as the circuits that they will run as, by backprop through the unrolled run.

Massively Parallel Video Networks (Carreira, Patraucean et al., ECCV 2018). The clip makes the ticks; with
``target="newest"`` the answer of tick t is compared with the truth of frame t, of which a deep stage has seen nothing
yet, so the net learns to predict; with "answered" with that of the oldest frame behind it.

Distillation from the sequential net (its weights frozen, all stages on the same frame):

    L = L_task + distill * sum over stages i < K of (1 / n_i) |h_i - a_i|^2

h_i is everything that stage i wrote, n_i the number of its elements, a_i what the teacher's stage i makes of the frame
that h_i is about: the oldest that had a part in it (the trunk's), or the newest. That there is such a distillation is
sourced; which layers, which alignment and which weight the paper takes is not known to us: that is our reading.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sidestream.circuit.ages import latency_ticks
from sidestream.circuit.net_stages import net_circuit
from sidestream.circuit.stage import Link, Stages
from sidestream.circuit.wire import Circuit
from sidestream.circuit.wiring import wire
from sidestream.engine.unroll import Trace, unroll
from sidestream.errors import InputError
from sidestream.models.depth_net import DepthNet
from sidestream.models.weights import load_weights
from sidestream.train.rules import MakeOptimizer, Metrics, StepContext, Update, check_finite
from sidestream.train.skip_net import SkipNet
from sidestream.train.stages import circuit_of
from sidestream.train.tasks import Task

Align = Literal["oldest", "newest"]


class LiveNet(nn.Module):
    """``model`` as it runs on a stream: ``clip_BTCHW`` -> the answers of its circuit that come while the clip lasts.

    Answer n is given in tick n + latency, when frame n + latency is the newest; the first ``latency`` ticks have none.
    Parameters are the model's. Raises ``InputError`` for models that do not say what their stages are.
    """

    def __init__(self, model: nn.Module, frame_BCHW: Tensor, wiring: str = "parallel") -> None:
        super().__init__()
        self.model = model
        self.circuit = wired(model, frame_BCHW, wiring)
        self.training = model.training  # the model's layers keep their own modes

    @property
    def latency(self) -> int:
        return latency_ticks(self.circuit)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self.answers(clip_BTCHW)

    def answers(self, clip_BTCHW: Tensor) -> Tensor:
        """(B, T - latency, ...)."""
        return unroll(self.circuit, clip_BTCHW, drain=False).answers


class Predictive:
    """The ``TrainStep``. Raises ``InputError`` for options that do not go together, and clips that are too short."""

    def __init__(self, context: StepContext) -> None:
        config, model = context.config, context.model
        if context.example_BTCHW is None:
            raise InputError("the rule 'unrolled' needs an example: StepContext(..., example_BTCHW=a batch of clips)")
        if config.feedback != "own":
            raise InputError(f"feedback={config.feedback!r} with the rule 'unrolled', which goes back over the own")
        self._context, self._task = context, context.task
        frame_BCHW = context.example_BTCHW[:1, 0]
        self._teacher = self._sequential_teacher(frame_BCHW)
        if config.feedback_wire:
            if not isinstance(model, DepthNet):
                raise InputError(f"{type(model).__name__} cannot be fed its last answer; take par_densenet")
            model.add_feedback()
        elif isinstance(model, DepthNet) and model.has_feedback:
            raise InputError(
                "the weights to start from are of a net with feedback; add feedback_wire (--feedback-wire)"
            )
        self._live = LiveNet(model, frame_BCHW, config.wired)
        self._task.align(self._live.circuit)
        self._drains = config.target == "answered"
        num_frames = context.example_BTCHW.shape[1]
        if num_frames <= self._live.latency:
            raise InputError(
                f"clips of {num_frames} frames end before the circuit ({config.wired}) answers, after "
                f"{self._live.latency} ticks; give longer clips (num_frames), or a wiring with fewer groups"
            )

    @property
    def circuit(self) -> Circuit:
        return self._live.circuit

    def make_optimizers(self, make: MakeOptimizer) -> list[Optimizer]:
        return [make(p for p in self._context.model.parameters() if p.requires_grad)]

    def step(self, clip_BTCHW: Tensor, labels_B: Tensor, update: Update) -> Metrics:
        config = self._context.config
        with self._autocast(clip_BTCHW.device.type):
            run = unroll(self.circuit, clip_BTCHW, drain=self._drains, traced=self._teacher is not None)
            loss = task_loss = self._task.clip_loss(run.answers, clip_BTCHW, labels_B)
            more: Metrics = {}
            if self._teacher is not None:
                with torch.no_grad():
                    taught = unroll(self._teacher, clip_BTCHW, drain=False, traced=True)
                distance = distillation(run.traces[:-1], taught.traces[:-1], config.distill_frame)  # type: ignore[arg-type]
                loss = task_loss + config.distill * distance
                more = {"task_loss": task_loss.detach(), "distillation": distance.detach()}
        check_finite(loss)
        self._context.backward(loss)
        update((0,))
        if self._task.measures_training:
            more |= self._task.train_metrics(run.answers.detach().mean(1), labels_B)
        return {"loss": loss.detach(), **more}

    def judged(self, net: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        """What evaluations look at: the circuit as it runs, every answer paired with the newest frame of its tick."""
        return self._live, newest(task)

    def _sequential_teacher(self, frame_BCHW: Tensor) -> Circuit | None:
        """The frozen net of the weights file, from which the student starts too; None where nothing is distilled."""
        config, model = self._context.config, self._context.model
        if config.teacher is not None:
            load_weights(model, config.teacher)
        if not config.distill:
            return None
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        return wired(teacher, frame_BCHW, "sequential")

    def _autocast(self, device_type: str) -> AbstractContextManager[object]:
        types = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = types.get(self._context.config.precision)
        return contextlib.nullcontext() if dtype is None else torch.autocast(device_type, dtype=dtype)


def newest(task: Task) -> Task:
    """``task``, with every answer paired with the newest frame of its tick."""
    task = copy.copy(task)
    if hasattr(task, "target"):
        task.target = "newest"
    return task


def distillation(student: Sequence[Trace], teacher: Sequence[Trace], align: Align = "oldest") -> Tensor:
    """The sum over the stages of the mean squared difference between what they wrote.

    ``teacher``: traces of a sequential circuit over the same clip. Ticks of the student whose frames are all repeats of
    the clip's last are left out.
    """
    total = torch.zeros(())
    for own, taught in zip(student, teacher, strict=True):
        frames = own.oldest_frames if align == "oldest" else own.newest_frames
        place = {frame: n for n, frame in enumerate(taught.ticks)}
        kept = [(n, place[frame]) for n, frame in enumerate(frames) if frame in place]
        squares, count = torch.zeros(()), 0
        for mine, theirs in zip(own.outputs, taught.outputs, strict=True):
            difference = mine[:, [n for n, _ in kept]] - theirs[:, [m for _, m in kept]]
            squares, count = squares.to(difference) + difference.square().sum(), count + difference.numel()
        total = total.to(squares) + squares / max(1, count)
    return total


def wired(model: nn.Module, frame_BCHW: Tensor, wiring: str) -> Circuit:
    """``model`` as a circuit by the name of its wiring; its stages take any number of streams, parameters are shared.

    Raises ``InputError`` for models that do not say what their stages are.
    """
    if isinstance(model, DepthNet):
        return net_circuit(model, frame_BCHW, wiring)
    if not isinstance(model, SkipNet) and not hasattr(model, "depth_modules"):
        raise InputError(
            f"{type(model).__name__} does not say what its stages are, so it cannot be unrolled; take par_densenet, "
            "par_inception, or a net of layers such as vgg8 or keypoint_cnn"
        )
    modes = [(m, m.training) for m in model.modules()]
    try:
        for m, _ in modes:
            m.training = False  # so that batch norms count as modules without memory
        made, _ = circuit_of(model, frame_BCHW)
    finally:
        for m, mode in modes:
            m.training = mode
    own = tuple(replace(stage, hides_state=False) for stage in made.stages)
    links = tuple(Link(w.source, w.output, w.target, w.input) for w in made.wires)
    stages = Stages(own, links, made.in_spec, made.out_spec, made.name, made.input_spec, made.example)
    return wire(stages, wiring)
