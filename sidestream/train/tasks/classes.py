"""Classes: of the clip's logits, or of every frame's; cross entropy and top-1 accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.data import Batch
from sidestream.errors import InputError
from sidestream.train.answering import cross_entropy
from sidestream.train.evaluate import evaluate
from sidestream.train.tasks.task import IGNORED, Scores, Task


class ClassTask(Task):
    """Every answer of a clip has the clip's label."""

    score = "accuracy"
    measures_training = True

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def labels_of(self, batch: Batch) -> Tensor:
        return batch.labels_B

    def fed_targets(self, clip_BTCHW: Tensor, labels: Tensor) -> list[Any]:
        return [labels] * clip_BTCHW.shape[1]

    def frame_loss(self, answer: Any, target: Any) -> Tensor:
        if not isinstance(answer, Tensor) or answer.ndim != 2:
            raise InputError(f"the net answers {getattr(answer, 'shape', type(answer))}, not class logits (B, N)")
        _check_range(target, answer.shape[1])
        return cross_entropy(answer.unsqueeze(1), target, self.label_smoothing)

    def clip_loss(self, answers: Tensor, clip_BTCHW: Tensor, labels: Tensor, *, first: int = 0) -> Tensor:
        _check_range(labels, answers.shape[-1])
        return cross_entropy(answers, labels, self.label_smoothing)

    def train_metrics(self, mean_answer: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"accuracy": (mean_answer.argmax(-1) == labels).float().mean()}

    def check_answers(self, model: str, answers: Any, clip_BTCHW: Tensor, num_outputs: int) -> None:
        if not isinstance(answers, Tensor) or answers.ndim != 3 or answers.shape[0] != clip_BTCHW.shape[0]:
            given = tuple(answers.shape) if isinstance(answers, Tensor) else type(answers).__name__
            raise InputError(
                f"{model} answers {given}, not one row of class logits per clip or frame; take a model (and a head) "
                "that answers classes"
            )
        if answers.shape[-1] < num_outputs:
            raise InputError(
                f"{model} answers {answers.shape[-1]} classes, but the labels go from 0 to {num_outputs - 1}; "
                f"make the model with num_classes={num_outputs}"
            )

    def evaluate(
        self, net: nn.Module, batches: Iterable[Batch], *, device: torch.device | str, gather: Callable | None
    ) -> Scores:
        found = evaluate(net, batches, device=device, gather=gather)
        return Scores(found.num_records, found.loss, {"accuracy": found.accuracy})


def _check_range(labels: Tensor, num_classes: int) -> None:
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= num_classes))]
    if len(wrong):
        raise InputError(f"label {int(wrong[0])} is out of range: the net answers classes 0 to {num_classes - 1}")
