"""Keypoints: answers are heat maps, one per keypoint and frame; cross entropy over the cells, PCK and pixel error.

The target of a map is a Gaussian with a standard deviation of one cell, made to sum to one; the loss is the cross
entropy between it and the map's softmax over all cells, the mean over the visible points. (So ``points_from_maps``,
which takes the same softmax, reads the maps.) Points outside of the picture are not visible, and count nowhere.

Metrics: pck_0.1 and pck_0.2, the share of points within so much of the person's size (max(height, width) of the box
around the visible joints of the frame); error_px, the mean distance in pixels of the model's input. Beside them stand
those of the mean pose of the training clips (``mean_pose_``), which needs no net.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.data import Batch, Loader
from sidestream.errors import InputError
from sidestream.models.heatmaps import gaussian_maps, pck, points_from_maps
from sidestream.train.tasks.task import Panel, Scores, SequenceTask, check_maps
from sidestream.types import InputSpec

SIGMA_CELLS = 1.0
WINDOW = 2
"""Points are read from the cells at most so far from the largest one."""
ALPHAS = (0.1, 0.2)
MAX_CLIPS_FOR_MEAN = 256
MAX_PANELS = 6


class KeypointTask(SequenceTask):
    """Labels are ``points_BTP3``: x, y in pixels of the clip's pictures, and above 0 where the point is visible."""

    score = "pck_0.2"

    def __init__(self, *, target: str = "answered", spec: InputSpec | None = None) -> None:
        super().__init__(horizon=None, target=target)
        self._spec = spec
        self.mean_pose_P2: Tensor | None = None

    def learn(self, train: Loader) -> None:
        total, count, num_clips = torch.zeros(()), torch.zeros(()), 0
        for batch in train.batches(0):
            points_BTP3 = self.labels_of(batch).double()
            visible = points_BTP3[..., 2:] > 0
            total = total + (points_BTP3[..., :2] * visible).sum((0, 1))
            count = count + visible.sum((0, 1))
            num_clips += len(batch)
            if num_clips >= MAX_CLIPS_FOR_MEAN:
                break
        self.mean_pose_P2 = (total / count.clamp(min=1)).float()

    def labels_of(self, batch: Batch) -> Tensor:
        if batch.points_BTP3 is None:
            raise InputError(
                "the task 'keypoints' needs clips with keypoints; open the data set with with_points=True (jhmdb, "
                "synthetic)"
            )
        return batch.points_BTP3

    def truths(self, clip_BTCHW: Tensor, labels: Tensor) -> list[Any]:
        size_px = int(clip_BTCHW.shape[-2]), int(clip_BTCHW.shape[-1])
        return [(points_BP3, size_px) for points_BP3 in labels.unbind(1)]

    def frame_loss(self, answer: Any, target: Any) -> Tensor:
        points_BP3, size_px = target
        if not isinstance(answer, Tensor) or answer.ndim != 4 or answer.shape[:2] != points_BP3.shape[:2]:
            given = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise InputError(f"the net answers {given}, not heat maps {tuple(points_BP3.shape[:2])} + (H, W)")
        maps = answer if answer.dtype == torch.float64 else answer.float()
        wanted = gaussian_maps(
            points_BP3[..., :2].to(maps), _map_size(maps), cell_px(maps, size_px), sigma_cells=SIGMA_CELLS
        ).flatten(2)
        shares = wanted / wanted.sum(-1, keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
        losses_BP = -(shares * maps.flatten(2).log_softmax(-1)).sum(-1)
        visible_BP = points_BP3[..., 2] > 0
        return (losses_BP * visible_BP).sum() / visible_BP.sum().clamp(min=1)

    def check_answers(self, model: str, answers: Any, clip_BTCHW: Tensor, num_outputs: int) -> None:
        check_maps(model, answers, clip_BTCHW)
        if answers.shape[2] != num_outputs:
            raise InputError(
                f"{model} answers {answers.shape[2]} heat maps, but the clips have {num_outputs} keypoints; make the "
                f"model with num_classes={num_outputs}"
            )
        cell_px(answers[:, 0], (int(clip_BTCHW.shape[-2]), int(clip_BTCHW.shape[-1])))

    @torch.no_grad()
    def evaluate(
        self, net: nn.Module, batches: Iterable[Batch], *, device: torch.device | str, gather: Callable | None
    ) -> Scores:
        was_training = net.training
        net.eval()
        rows: list[tuple[list[str], list[float], dict[str, float]]] = []
        for batch in batches:
            clip_BTCHW, labels = batch.clip_BTCHW.to(device), self.labels_of(batch).to(device)
            answers = net(clip_BTCHW)
            loss = float(self.clip_loss(answers, clip_BTCHW, labels))
            truth_NP3 = labels[:, self.lead :].flatten(0, 1).cpu()
            found = self._points(answers, clip_BTCHW)[:, : clip_BTCHW.shape[1] - self.lead].flatten(0, 1).cpu()
            sums = _sums("", found, truth_NP3)
            if self.mean_pose_P2 is not None:
                sums |= _sums("mean_pose_", self.mean_pose_P2.expand_as(found), truth_NP3)
            rows.append((list(batch.keys), [loss] * len(batch), sums))
        net.train(was_training)
        rows = rows if gather is None else gather(rows)
        keys = {key for each, _, _ in rows for key in each}
        losses = [loss for _, each, _ in rows for loss in each]
        totals = {name: sum(sums[name] for _, _, sums in rows) for name in (rows[0][2] if rows else {})}
        count = max(1.0, totals.pop("num_points", 0.0))
        means = {name: total / count for name, total in totals.items()}
        return Scores(len(keys), sum(losses) / max(1, len(losses)), means)

    def _points(self, answers: Tensor, clip_BTCHW: Tensor) -> Tensor:
        size_px = int(clip_BTCHW.shape[-2]), int(clip_BTCHW.shape[-1])
        return points_from_maps(answers.float(), cell_px(answers[:, 0], size_px), window=WINDOW)[0]

    @torch.no_grad()
    def panels(self, net: nn.Module, batch: Batch, device: torch.device | str) -> dict[str, list[Panel]]:
        """The middle frame of a few clips, with the points that are visible and those that were found."""
        clip_BTCHW, labels = batch.clip_BTCHW[:MAX_PANELS], self.labels_of(batch)[:MAX_PANELS]
        found_BTP2 = self._points(net(clip_BTCHW.to(device)), clip_BTCHW).cpu()
        s = (clip_BTCHW.shape[1] - 1 - self.lead) // 2
        frames = clip_BTCHW[:, s + self.lead]
        if self._spec is not None:
            frames = frames * torch.tensor(self._spec.std).view(3, 1, 1) + torch.tensor(self._spec.mean).view(3, 1, 1)
        panels = []
        for frame, truth_P3, found_P2 in zip(
            frames.clamp(0, 1), labels[:, s + self.lead], found_BTP2[:, s], strict=True
        ):
            visible = truth_P3[:, 2] > 0
            panels.append(Panel(frame, (("true", truth_P3[visible, :2]), ("answer", found_P2[visible]))))
        return {"visible points": panels}


def cell_px(maps_BPHW: Tensor, size_px: tuple[int, int]) -> float:
    """Width of a cell. Raises ``InputError`` where it is not as wide as high."""
    height, width = _map_size(maps_BPHW)
    if size_px[0] * width != size_px[1] * height:
        raise InputError(
            f"heat maps of {height} x {width} cells do not lie on frames of {size_px[0]} x {size_px[1]} px"
        )
    return size_px[1] / width


def _map_size(maps_BPHW: Tensor) -> tuple[int, int]:
    return int(maps_BPHW.shape[-2]), int(maps_BPHW.shape[-1])


def _sums(name: str, found_NP2: Tensor, truth_NP3: Tensor) -> dict[str, float]:
    """Over the visible points."""
    truth_NP2, visible_NP = truth_NP3[..., :2], truth_NP3[..., 2] > 0
    sums = {f"{name}pck_{alpha}": float(_right(found_NP2, truth_NP2, visible_NP, alpha)) for alpha in ALPHAS}
    sums[f"{name}error_px"] = float(((found_NP2 - truth_NP2).norm(dim=-1) * visible_NP).sum())
    return {**sums, "num_points": float(visible_NP.sum())}


def _right(found_NP2: Tensor, truth_NP2: Tensor, visible_NP: Tensor, alpha: float) -> int:
    return pck(found_NP2, truth_NP2, alpha=alpha, labelled_NP=visible_NP).num_right
