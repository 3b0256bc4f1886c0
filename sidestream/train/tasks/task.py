"""``Task``: what the loop and the rules ask of a task; ``SequenceTask``: one with a truth for every frame."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.circuit.ages import information_latency_ticks, latency_ticks
from sidestream.circuit.wire import Circuit
from sidestream.data import Batch, Loader
from sidestream.errors import InputError
from sidestream.models import info_of
from sidestream.types import NOTHING

IGNORED = -100
"""In the labels of clips that only fill up a batch, everywhere; losses leave such clips out."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What an evaluation came to."""

    num_records: int
    loss: float
    """Mean over clips."""
    values: dict[str, float]
    """By name; ``Task.score`` is one of them."""


@dataclass(frozen=True, slots=True)
class Panel:
    """A picture of ``samples.png``."""

    pixels_CHW: Tensor
    """In [0, 1]."""
    points: tuple[tuple[str, Tensor], ...] = ()
    """Name -> (P, 2), x and y in pixels."""


class Task(ABC):
    """A task. ``labels`` are what ``labels_of`` took from the batch; rows may have been filled up with ``IGNORED``.

    A task looks at the circuit that will be trained (``align``) before it is asked for targets.
    """

    score: str
    """The value of an evaluation that decides which weights are the best; higher is better."""
    measures_training: bool = False
    """Whether ``train_metrics`` wants the answers of training batches."""

    def align(self, circuit: Circuit) -> None:
        """Take note of which frames an answer of ``circuit`` has seen."""
        return

    def learn(self, train: Loader) -> None:
        """Look at the training clips, for baselines. Called once, before the first evaluation."""
        return

    def check_clips(self, model: nn.Module, num_frames: int) -> None:
        """Raises ``InputError`` for clips, or a model, from which the task can learn nothing. After ``align``."""
        return

    @abstractmethod
    def labels_of(self, batch: Batch) -> Tensor:
        """What the rules are given beside the clips, (B, ...)."""

    @abstractmethod
    def fed_targets(self, clip_BTCHW: Tensor, labels: Tensor) -> list[Any]:
        """What enters a circuit beside each of the T frames, for ``frame_loss``; NOTHING where there is no target."""

    @abstractmethod
    def frame_loss(self, answer: Any, target: Any) -> Tensor:
        """Of one answer of each clip: a scalar, the mean over the clips."""

    @abstractmethod
    def clip_loss(self, answers: Tensor, clip_BTCHW: Tensor, labels: Tensor, *, first: int = 0) -> Tensor:
        """Mean over the answers (B, T', ...) that have a target. ``first``: frame that the first of them is about."""

    def num_targets(self, num_answers: int, num_frames: int, first: int = 0) -> int:
        """How many of these answers have a target: those that ``clip_loss`` is the mean over."""
        return num_answers

    def train_metrics(self, mean_answer: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Further metrics of a training batch, from the mean over each clip's answers."""
        return {}

    @abstractmethod
    def check_answers(self, model: str, answers: Any, clip_BTCHW: Tensor, num_outputs: int) -> None:
        """Raises ``InputError`` for answers that the task cannot use. ``num_outputs``: of classes or keypoints."""

    @abstractmethod
    def evaluate(
        self, net: nn.Module, batches: Iterable[Batch], *, device: torch.device | str, gather: Callable | None
    ) -> Scores:
        """One pass over a data set; ``net``: an ``Answering``. ``gather``: collects a list from all processes."""

    def panels(self, net: nn.Module, batch: Batch, device: torch.device | str) -> dict[str, list[Panel]]:
        """Rows of pictures for ``samples.png``, by name, one picture per clip; empty for tasks that show none."""
        return {}


class SequenceTask(Task):
    """Each answer is compared with the truth of one frame of the clip, ``lead`` frames after the one it is about.

    Answer s of a clip is about frame s. Its circuit gives it ``latency`` ticks after frame s came, and it has seen
    frames up to s + ``fresh``: 0 without skips, more with them. So with ``target``

        "answered"   ``horizon`` counts from the newest frame that the answer has seen: lead = fresh + horizon
        "newest"     from the newest frame of the stream when the answer is given: lead = latency + horizon

    and without a horizon the truth is that of the frame itself: lead = 0, or with "newest" latency. Answers whose
    truth lies behind the end of the clip have no target.
    """

    def __init__(self, *, horizon: int | None, target: str) -> None:
        self.horizon, self.target = horizon, target
        self.fresh = self.latency = 0

    def align(self, circuit: Circuit) -> None:
        self.latency = latency_ticks(circuit)
        self.fresh = self.latency - information_latency_ticks(circuit)

    @property
    def lead(self) -> int:
        return self.fed_lead + (self.latency if self.target == "newest" else 0)

    @property
    def fed_lead(self) -> int:
        """The same, counted from the frame with which a target enters: on its wire it waits for the answered frame,
        and not at all for the newest."""
        if self.horizon is None:
            return 0
        return self.horizon + (self.fresh if self.target == "answered" else 0)

    def check_clips(self, model: nn.Module, num_frames: int) -> None:
        self._check_length(num_frames)
        info = info_of(model)
        if self.horizon is not None and info is not None and not info.input_spec.causal:
            raise InputError(f"{info.name} sees later frames (it is not causal), so none is left to come; take another")

    @abstractmethod
    def truths(self, clip_BTCHW: Tensor, labels: Tensor) -> list[Any]:
        """Of each of the T frames, for ``frame_loss``."""

    def fed_targets(self, clip_BTCHW: Tensor, labels: Tensor) -> list[Any]:
        self._check_length(clip_BTCHW.shape[1])
        truths = self.truths(clip_BTCHW, labels)
        return [*truths[self.fed_lead :], *[NOTHING] * self.fed_lead]

    def clip_loss(self, answers: Tensor, clip_BTCHW: Tensor, labels: Tensor, *, first: int = 0) -> Tensor:
        self._check_length(clip_BTCHW.shape[1])
        truths = self.truths(clip_BTCHW, labels)[first + self.lead :]
        pairs = zip(answers.unbind(1), truths, strict=False)
        losses = [self.frame_loss(answer, truth) for answer, truth in pairs]
        return torch.stack(losses).mean() if losses else answers.sum() * 0.0

    def num_targets(self, num_answers: int, num_frames: int, first: int = 0) -> int:
        return max(0, min(num_answers, num_frames - self.lead - first))

    def _check_length(self, num_frames: int) -> None:
        if num_frames <= self.lead:
            raise InputError(
                f"clips of {num_frames} frames hold no target: it lies {self.lead} frames after the answered one "
                f"(horizon {self.horizon}, target {self.target!r}); give longer clips (num_frames)"
            )


def check_maps(model: str, answers: Any, clip_BTCHW: Tensor) -> None:
    """Raises ``InputError`` unless there is a map (B, T, C, H, W) for every frame."""
    wanted = tuple(clip_BTCHW.shape[:2])
    if not isinstance(answers, Tensor) or answers.ndim != 5 or answers.shape[:2] != wanted:
        given = tuple(answers.shape) if isinstance(answers, Tensor) else type(answers).__name__
        raise InputError(
            f"{model} answers {given}; this task wants maps of every frame, {wanted} and then (C, H, W): use a model "
            "that draws, such as conv_autoencoder (pictures) or keypoint_cnn (keypoints)"
        )
