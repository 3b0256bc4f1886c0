"""Drawing: answers are pictures, the frame itself (auto-encoding) or one to come; mean squared error, and PSNR.

The loss is taken in the space of the model's input (normalised as its spec says), in which it answers. Metrics are in
pixels in [0, 1], answers clamped to it: mse, and psnr = the mean over frames of -10 log10(mse of the frame), at most
100 dB. Beside them stand those of answers that need no net: the mean of the training frames (``mean_frame_``), and,
where the target is yet to come, the newest frame that was seen (``repeat_``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.data import Batch, Loader
from sidestream.errors import InputError
from sidestream.train.tasks.task import IGNORED, Panel, Scores, SequenceTask, check_maps
from sidestream.types import InputSpec

LEAST_MSE = 1e-10
MAX_CLIPS_FOR_MEAN = 256
MAX_PANELS = 6


class DrawingTask(SequenceTask):
    """``horizon`` None: draw frame t (auto-encoding); else the frame so many frames after the newest one seen."""

    score = "psnr"

    def __init__(self, *, horizon: int | None, target: str = "answered", spec: InputSpec | None = None) -> None:
        super().__init__(horizon=horizon, target=target)
        self._mean = torch.tensor(spec.mean if spec is not None else (0.0,) * 3).view(3, 1, 1)
        self._std = torch.tensor(spec.std if spec is not None else (1.0,) * 3).view(3, 1, 1)
        self.mean_frame_CHW: Tensor | None = None
        """In [0, 1]."""

    def learn(self, train: Loader) -> None:
        total, num_frames, num_clips = torch.zeros(()), 0, 0
        for batch in train.batches(0):
            pixels = self._pixels(batch.clip_BTCHW).double()
            total, num_frames = total + pixels.sum((0, 1)), num_frames + pixels.shape[0] * pixels.shape[1]
            num_clips += len(batch)
            if num_clips >= MAX_CLIPS_FOR_MEAN:
                break
        self.mean_frame_CHW = (total / num_frames).float()

    def labels_of(self, batch: Batch) -> Tensor:
        return batch.labels_B

    def truths(self, clip_BTCHW: Tensor, labels: Tensor) -> list[Any]:
        counts_B = labels != IGNORED
        return [(frame_BCHW, counts_B) for frame_BCHW in clip_BTCHW.unbind(1)]

    def frame_loss(self, answer: Any, target: Any) -> Tensor:
        frame_BCHW, counts_B = target
        if not isinstance(answer, Tensor) or answer.shape != frame_BCHW.shape:
            given = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise InputError(f"the net answers {given}, not pictures of the frames' shape {tuple(frame_BCHW.shape)}")
        answer = answer if answer.dtype == torch.float64 else answer.float()
        errors_B = (answer - frame_BCHW).square().mean((1, 2, 3))
        return (errors_B * counts_B).sum() / counts_B.sum().clamp(min=1)

    def check_answers(self, model: str, answers: Any, clip_BTCHW: Tensor, num_outputs: int) -> None:
        check_maps(model, answers, clip_BTCHW)
        if answers.shape != clip_BTCHW.shape:
            raise InputError(
                f"{model} answers {tuple(answers.shape)}, not pictures of the clip's shape {tuple(clip_BTCHW.shape)}"
            )

    @torch.no_grad()
    def evaluate(
        self, net: nn.Module, batches: Iterable[Batch], *, device: torch.device | str, gather: Callable | None
    ) -> Scores:
        was_training = net.training
        net.eval()
        rows: list[tuple[str, float, dict[str, float]]] = []
        for batch in batches:
            clip_BTCHW, labels_B = batch.clip_BTCHW.to(device), batch.labels_B.to(device)
            answers = net(clip_BTCHW)
            loss = float(self.clip_loss(answers, clip_BTCHW, labels_B))
            values = self._errors(answers, clip_BTCHW)
            for n, key in enumerate(batch.keys):
                rows.append((key, loss, {name: float(value_B[n]) for name, value_B in values.items()}))
        net.train(was_training)
        rows = rows if gather is None else gather(rows)
        count = max(1, len(rows))
        names = rows[0][2] if rows else {}
        means = {name: sum(values[name] for _, _, values in rows) / count for name in names}
        return Scores(len({key for key, _, _ in rows}), sum(loss for _, loss, _ in rows) / count, means)

    def _errors(self, answers: Tensor, clip_BTCHW: Tensor) -> dict[str, Tensor]:
        """Name -> mean over the frames of each clip (B,). Every clip has as many frames with a target."""
        num_answers = clip_BTCHW.shape[1] - self.lead
        pixels = self._pixels(clip_BTCHW)
        truth = pixels[:, self.lead :]
        drawn = {"": self._pixels(answers[:, :num_answers])}
        if self.mean_frame_CHW is not None:
            drawn["mean_frame_"] = self.mean_frame_CHW.to(pixels.device).expand_as(truth)
        if self.lead > self.fresh:
            drawn["repeat_"] = pixels[:, self.fresh : self.fresh + num_answers]
        found: dict[str, Tensor] = {}
        for name, picture in drawn.items():
            mse_BT = (picture - truth).square().mean((2, 3, 4))
            found[f"{name}mse"] = mse_BT.mean(1)
            found[f"{name}psnr"] = psnr(mse_BT).mean(1)
        return found

    def _pixels(self, clip_BTCHW: Tensor) -> Tensor:
        clip = clip_BTCHW.detach().float()
        return (clip * self._std.to(clip.device) + self._mean.to(clip.device)).clamp(0.0, 1.0)

    @torch.no_grad()
    def panels(self, net: nn.Module, batch: Batch, device: torch.device | str) -> dict[str, list[Panel]]:
        """The middle one of the answers that have a target, of a few clips."""
        clip_BTCHW = batch.clip_BTCHW[:MAX_PANELS]
        answers = net(clip_BTCHW.to(device)).cpu()
        s = (clip_BTCHW.shape[1] - 1 - self.lead) // 2
        ahead = self.lead - self.fresh
        shown = {"input = target" if ahead <= 0 else f"target, {ahead} later": clip_BTCHW[:, s + self.lead]}
        if ahead > 0:
            shown = {"newest seen": clip_BTCHW[:, s + self.fresh], **shown}
        shown["answer"] = answers[:, s]
        return {name: [Panel(each) for each in self._pixels(frames)] for name, frames in shown.items()}


def psnr(mse: Tensor) -> Tensor:
    """Peak signal to noise ratio in dB, of mean squared errors of pixels in [0, 1]; at most 100."""
    return -10.0 * mse.clamp(min=LEAST_MSE).log10()
