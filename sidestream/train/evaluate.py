"""``evaluate``: loss and top-1 accuracy of a model on a data set; clips of one record are averaged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sidestream.data import Batch
from sidestream.train.answering import cross_entropy


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Counts of one pass over a data set; records count, not clips."""

    num_records: int
    num_correct: int
    loss: float
    """Mean over clips."""
    per_class: dict[int, tuple[int, int]]
    """Label -> (correct, records)."""

    @property
    def accuracy(self) -> float:
        return self.num_correct / max(1, self.num_records)


def evaluate(
    net: nn.Module, batches: Iterable[Batch], *, device: torch.device | str = "cpu", gather: Callable | None = None
) -> Evaluation:
    """``net``: an ``Answering``. A record's logits are the mean over its answers and its clips.

    ``gather``: collects a list of plain objects from all processes; None where there is one.
    """
    was_training = net.training
    net.eval()
    logits_of: dict[str, list[Tensor]] = defaultdict(list)
    label_of: dict[str, int] = {}
    losses: list[float] = []
    with torch.no_grad():
        for batch in batches:
            labels_B = batch.labels_B.to(device)
            logits_BTN = net(batch.clip_BTCHW.to(device))
            losses += [float(cross_entropy(logits_BTN, labels_B))] * len(batch)
            for key, label, row_N in zip(
                batch.keys, batch.labels_B.tolist(), logits_BTN.float().mean(1).cpu(), strict=True
            ):
                logits_of[key].append(row_N)
                label_of[key] = label
    net.train(was_training)
    answers = [(key, label_of[key], int(torch.stack(rows).mean(0).argmax())) for key, rows in logits_of.items()]
    if gather is not None:
        answers, losses = gather(answers), gather(losses)
    return tally(answers, losses)


def tally(answers: Iterable[tuple[str, int, int]], losses: list[float]) -> Evaluation:
    """From (key, label, answer) to counts."""
    per_class: dict[int, tuple[int, int]] = {}
    for _, label, answer in answers:
        correct, count = per_class.get(label, (0, 0))
        per_class[label] = correct + (answer == label), count + 1
    num_correct = sum(correct for correct, _ in per_class.values())
    num_records = sum(count for _, count in per_class.values())
    return Evaluation(num_records, num_correct, sum(losses) / max(1, len(losses)), dict(sorted(per_class.items())))
