"""The loop that all rules share: batches, updates, evaluation, log, checkpoints; stopped anywhere, it can go on.

    for epoch:  for batch:  seed; rate; rule.step(clips, labels, update)
                evaluate; log; best weights; checkpoint

Everything that is random is a function of (seed, epoch, batch), and a checkpoint holds the rest, so a resumed run
ends with the weights of an unbroken one (to the bit, on the CPU with as many threads).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from sidestream.data import Batch, Loader
from sidestream.errors import TrainError
from sidestream.train.checkpoint import load_checkpoint, save_checkpoint
from sidestream.train.config import TrainConfig
from sidestream.train.folder import BEST, DIAGNOSTICS, LAST, RunFolder
from sidestream.train.hardware import gather_objects, seed_all
from sidestream.train.norms import to_train_mode
from sidestream.train.progress import Progress
from sidestream.train.rules import NotFinite, TrainStep, judged
from sidestream.train.schedule import learning_rate
from sidestream.train.tasks import Scores, Task

LOGS_PER_EPOCH = 10


@dataclass
class Position:
    """Where a run stands: the next batch, and what it has seen."""

    epoch: int = 0
    batch: int = 0
    num_updates: int = 0
    num_clips: int = 0
    """Of this epoch, like the two sums."""
    loss_sum: float = 0.0
    correct_sum: float = 0.0
    best_score: float | None = None
    epochs_since_best: int = 0
    seconds: float = 0.0
    """Of training, evaluation included, over all the times it was resumed."""
    is_done: bool = False
    log_bytes: int = 0
    diagnostics_bytes: int = 0


class Loop:
    """One run. ``accelerator``, ``net`` (prepared), ``rule`` and its ``optimizers`` belong together."""

    def __init__(
        self,
        *,
        accelerator: Any,
        net: nn.Module,
        rule: TrainStep,
        optimizers: Sequence[Any],
        loaders: tuple[Loader, Loader | None],
        config: TrainConfig,
        folder: RunFolder,
        task: Task,
    ) -> None:
        self.accelerator, self.net, self.rule, self.optimizers = accelerator, net, rule, optimizers
        self.train_loader, self.test_loader = loaders
        self.config, self.folder, self.task = config, folder, task
        self.model: nn.Module = accelerator.unwrap_model(net).model
        self.at = Position()
        self._updates_per_epoch = -(-len(self.train_loader) // config.accumulate)
        self._is_last_of_update = True
        self._saved_at = self._resumed_at = time.monotonic()

    @property
    def num_batches(self) -> int:
        return self.config.epochs * len(self.train_loader)

    def resume(self) -> None:
        position, rule_state = load_checkpoint(self.folder.path, self.model, self.optimizers)
        self.at = Position(**position)
        if hasattr(self.rule, "load_state_dict"):
            self.rule.load_state_dict(rule_state)
        self.folder.cut_log(self.at.log_bytes)
        self.folder.cut_log(self.at.diagnostics_bytes, DIAGNOSTICS)

    def run(self, progress: Progress) -> None:
        """Train to the end. Raises ``TrainError`` for a loss that is not finite; the last checkpoint stays."""
        self._saved_at = self._resumed_at = time.monotonic()
        self._before_seconds = self.at.seconds
        self.save()
        while not self.at.is_done:
            self._epoch(progress)

    def _epoch(self, progress: Progress) -> None:
        at, started, clips_before = self.at, time.monotonic(), self.at.num_clips
        to_train_mode(self.net, freeze_norms=self.config.freeze_norms)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for batch in self.train_loader.batches(at.epoch, at.batch):
            self._is_last_of_update = (batch.number + 1) % self.config.accumulate == 0
            self._is_last_of_update |= batch.number + 1 == len(self.train_loader)
            self._batch(batch)
            at.batch = batch.number + 1
            progress.batch(at.epoch * len(self.train_loader) + at.batch, at.epoch, at.loss_sum / at.num_clips)
            if self._is_last_of_update and time.monotonic() - self._saved_at >= 60 * self.config.checkpoint_minutes:
                self.save()
        train_seconds = time.monotonic() - started
        record = self._epoch_record(self._evaluate(), (at.num_clips - clips_before) / train_seconds)
        progress.epoch(record)
        if self.accelerator.is_main_process:
            self.folder.note(record)
        self._next_epoch(record)
        self.save()

    def _batch(self, batch: Batch) -> None:
        at, device = self.at, self.accelerator.device
        seed_all(self.config.seed, at.epoch, batch.number, self.accelerator.process_index)
        self._set_rate()
        if self.config.diagnose and (at.epoch * len(self.train_loader) + batch.number) % self.config.diagnose == 0:
            self._diagnose(batch)
        waits = contextlib.nullcontext() if self._is_last_of_update else self.accelerator.no_sync(self.net)
        try:
            with waits:
                metrics = self.rule.step(
                    batch.clip_BTCHW.to(device), self.task.labels_of(batch).to(device), self._update
                )
            values = {name: float(value) for name, value in metrics.items()}
            if not all(map(torch.isfinite, map(torch.tensor, values.values()))):
                raise NotFinite(f"the rule reports {values}")
        except NotFinite as error:
            raise TrainError(
                f"{error} in epoch {at.epoch + 1}, batch {batch.number + 1} (first clip {batch.keys[0]!r}); the run "
                f"stops, and the last good checkpoint stays in {str(self.folder.path)!r}; lower lr "
                f"(now {self.config.lr:g}), give a clip_norm, or look at the clips"
            ) from error
        at.num_updates += self._is_last_of_update
        at.num_clips += len(batch)
        at.loss_sum += values["loss"] * len(batch)
        at.correct_sum += values.get("accuracy", 0.0) * len(batch)
        every = max(1, len(self.train_loader) // LOGS_PER_EPOCH)
        if self.accelerator.is_main_process and batch.number % every == 0:
            place = {"kind": "batch", "epoch": at.epoch, "batch": batch.number}
            self.folder.note({**place, "lr": self._rate(), **values})

    def _diagnose(self, batch: Batch) -> None:
        """How wrong the gradients on this batch's first clips would be; changes nothing but the file about it."""
        device, at = self.accelerator.device, self.at
        where = {"epoch": at.epoch, "batch": batch.number, "num_updates": at.num_updates, "lr": self._rate()}
        found = self.rule.diagnose(batch.clip_BTCHW.to(device), self.task.labels_of(batch).to(device))  # type: ignore[attr-defined]
        self.folder.note(*(where | record for record in found), name=DIAGNOSTICS)

    def _rate(self) -> float:
        """Of the update that the current batch belongs to."""
        return learning_rate(
            self.at.epoch * self._updates_per_epoch + self.at.batch // self.config.accumulate,
            base=self.config.lr,
            num_updates=self.config.epochs * self._updates_per_epoch,
            num_warmup=round(self.config.warmup_epochs * self._updates_per_epoch),
            schedule=self.config.schedule,
        )

    def _set_rate(self) -> None:
        rate = self._rate()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def _update(self, numbers: Sequence[int]) -> None:
        """Apply and clear the gradients of these groups; while batches are accumulated, leave them."""
        if not self._is_last_of_update:
            return
        for number in numbers:
            optimizer = self.optimizers[number]
            self._check_gradient([p for group in optimizer.param_groups for p in group["params"]])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _check_gradient(self, parameters: Sequence[nn.Parameter]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.config.clip_norm is not None:
            norm = self.accelerator.clip_grad_norm_(parameters, self.config.clip_norm)
        else:
            norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.precision != "fp16" and not torch.isfinite(norm):  # fp16's scaler passes such updates over
            raise NotFinite(f"the length of the gradient is {float(norm)}")

    def _evaluate(self) -> Scores | None:
        is_last = self.at.epoch + 1 == self.config.epochs
        if self.test_loader is None or not (is_last or (self.at.epoch + 1) % self.config.evaluate_every == 0):
            return None
        batches, gather = self.test_loader.batches(0), gather_objects(self.accelerator)
        net, task = judged(self.rule, self.net, self.task)
        return task.evaluate(net, batches, device=self.accelerator.device, gather=gather)

    def _epoch_record(self, found: Scores | None, clips_per_second: float) -> dict[str, Any]:
        at = self.at
        self._count_seconds()
        record = {
            "kind": "epoch",
            "epoch": at.epoch,
            "updates": at.num_updates,
            "train_loss": at.loss_sum / at.num_clips,
            **({"train_accuracy": at.correct_sum / at.num_clips} if self.task.measures_training else {}),
            "clips_per_second": clips_per_second,
            "seconds": at.seconds,
            "num_skipped": len(self.train_loader.dataset.skipped),
        }
        if found is not None:
            scores = {f"test_{name}": value for name, value in found.values.items()}
            record |= {"test_loss": found.loss, **scores, "test_records": found.num_records}
        return record

    def _next_epoch(self, record: dict[str, Any]) -> None:
        """Keep the best weights, and decide whether to go on."""
        at = self.at
        score = record.get(f"test_{self.task.score}") if self.test_loader is not None else -record["train_loss"]
        if score is not None and (at.best_score is None or score > at.best_score):
            at.best_score, at.epochs_since_best = score, 0
            if self.accelerator.is_main_process:
                self.folder.save_weights(self.model, BEST)
        else:
            at.epochs_since_best += 1
        at.epoch, at.batch, at.num_clips, at.loss_sum, at.correct_sum = at.epoch + 1, 0, 0, 0.0, 0.0
        is_stuck = score is not None and at.epochs_since_best >= (self.config.patience or math.inf)
        at.is_done = at.epoch == self.config.epochs or is_stuck

    def save(self) -> None:
        """A checkpoint, and the same weights as ``last.safetensors``."""
        self._count_seconds()
        self.at.log_bytes, self.at.diagnostics_bytes = self.folder.log_bytes(), self.folder.log_bytes(DIAGNOSTICS)
        if self.accelerator.is_main_process:
            rule_state = self.rule.state_dict() if hasattr(self.rule, "state_dict") else {}
            save_checkpoint(self.folder.path, self.model, self.optimizers, asdict(self.at), rule_state)
            self.folder.save_weights(self.model, LAST)
        self._saved_at = time.monotonic()

    def _count_seconds(self) -> None:
        self.at.seconds = self._before_seconds + time.monotonic() - self._resumed_at
