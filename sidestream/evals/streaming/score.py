"""``score``: what pairs of truth and answer are worth, by the metric that fits the kind of truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sidestream.errors import InputError
from sidestream.evals.metrics import Detections, box_ap, mask_iou, pck, top_1
from sidestream.evals.streaming.pairing import Pair, counts_of
from sidestream.evals.streaming.values import Boxes, Classes, ClassLabel, Masks, Points

ALPHAS = (0.1, 0.2)
"""Shares of the person's size for PCK."""
Folders = tuple[Path, Path]
"""Of the truth's masks, and of the answers'."""
_WANTED: dict[type, type] = {ClassLabel: Classes, Points: Points, Boxes: Boxes, Masks: Masks}


def score(pairs: Sequence[Pair], *, folders: tuple[str | Path, str | Path] = (".", ".")) -> dict[str, Any]:
    """Metric and counts as plain values; the first one is the metric's main figure, 0 to 1.

    class labels: top_1. points: pck@0.1, pck@0.2 and pck@0.2_per_joint. boxes: AP, AP50, ... (COCO). masks: mask_iou.
    A frame without an answer counts as an empty one: a wrong class, no right point, no box, IoU 0.

    Args:
        folders: where the mask files of the truth and of the answers are.

    Raises:
        InputError: no pair, or answers that are not of the truth's kind.
    """
    kinds = {type(p.truth.value) for p in pairs}
    if len(kinds) != 1:
        names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
        raise InputError(f"truth of the kinds {names}; expected one kind, and at least one frame")
    kind = kinds.pop()
    for p in pairs:
        if p.answer is not None and not isinstance(p.answer.value, _WANTED[kind]):
            raise InputError(
                f"frame {p.truth.frame_index} of {p.truth.clip!r}: the truth is a {kind.__name__}, the answer "
                f"{type(p.answer.value).__name__}; expected {_WANTED[kind].__name__}"
            )
    counts = counts_of(pairs)
    return {
        **_METRICS[kind](pairs, (Path(folders[0]), Path(folders[1]))),
        "num_frames": counts.num_frames,
        "in_time": counts.in_time,
        "miss": counts.miss,
        "mismatch": counts.mismatch,
        "mean_mismatch": counts.mean_mismatch,
    }


def main_figure(scores: dict[str, Any]) -> tuple[str, float]:
    """Name and value of the metric's main figure."""
    return next(iter(scores.items()))


def _classes(pairs: Sequence[Pair], folders: Folders) -> dict[str, Any]:
    best = [p.answer.value.top[0][0] if p.answer and p.answer.value.top else None for p in pairs]  # type: ignore
    return {"top_1": top_1(best, [p.truth.value.label for p in pairs])}  # type: ignore[union-attr]


def _points(pairs: Sequence[Pair], folders: Folders) -> dict[str, Any]:
    truths: list[Any] = [p.truth.value for p in pairs]
    nothing = torch.full_like(truths[0].points_P2_px, float("nan"))
    points = [nothing if p.answer is None else p.answer.value.points_P2_px for p in pairs]  # type: ignore[union-attr]
    if len(shapes := {tuple(t.shape) for t in (*points, *(t.points_P2_px for t in truths))}) > 1:
        raise InputError(f"points of the shapes {sorted(shapes)} in one evaluation; expected one number of joints")
    labelled_NP = torch.stack([t.scores_P > 0 for t in truths])
    stacked = torch.stack(points), torch.stack([t.points_P2_px for t in truths])
    found = {alpha: pck(*stacked, alpha=alpha, labelled_NP=labelled_NP) for alpha in ALPHAS}
    shares = {f"pck@{alpha:g}": found[alpha].share for alpha in reversed(ALPHAS)}
    return shares | {f"pck@{alpha:g}_per_joint": list(found[alpha].joint_shares) for alpha in reversed(ALPHAS)}


def _boxes(pairs: Sequence[Pair], folders: Folders) -> dict[str, Any]:
    def detections(value: Any) -> Detections:
        return Detections(value.boxes_N4_px, value.scores_N, value.labels_N)

    answers = [None if p.answer is None else detections(p.answer.value) for p in pairs]
    return dict(box_ap(answers, [detections(p.truth.value) for p in pairs]))


def _masks(pairs: Sequence[Pair], folders: Folders) -> dict[str, Any]:
    def iou(p: Any) -> float:
        return 0.0 if p.answer is None else mask_iou(p.answer.value.load(folders[1]), p.truth.value.load(folders[0]))

    return {"mask_iou": sum(map(iou, pairs)) / len(pairs)}


_METRICS: dict[type, Callable[[Sequence[Pair], Folders], dict[str, Any]]] = {
    ClassLabel: _classes,
    Points: _points,
    Boxes: _boxes,
    Masks: _masks,
}
