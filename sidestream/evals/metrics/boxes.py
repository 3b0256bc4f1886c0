"""Box average precision as COCO counts it, by pycocotools; and IoU of boxes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sidestream.errors import InputError, LayoutError, MissingExtraError

STATS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
"""The first six of COCO's summary: mean over IoU 0.50:0.95, at 0.5, at 0.75, and by area (32^2 and 96^2 pixels)."""


class Detections(NamedTuple):
    """The boxes of one picture."""

    boxes_N4_px: Tensor
    """x_min, y_min, x_max, y_max."""
    scores_N: Tensor
    labels_N: Tensor


def box_iou(boxes_N4: Tensor, others_M4: Tensor) -> Tensor:
    """Intersection over union of every box with every other, (N, M); 0 where both have no area."""
    if boxes_N4.ndim != 2 or others_M4.ndim != 2 or not boxes_N4.shape[-1] == others_M4.shape[-1] == 4:
        raise LayoutError(f"boxes of shape {tuple(boxes_N4.shape)} and {tuple(others_M4.shape)}; expected (N, 4)")
    top_left = torch.maximum(boxes_N4[:, None, :2], others_M4[None, :, :2])
    bottom_right = torch.minimum(boxes_N4[:, None, 2:], others_M4[None, :, 2:])
    shared_NM = (bottom_right - top_left).clamp(min=0).prod(-1)
    areas = [(b[:, 2:] - b[:, :2]).clamp(min=0).prod(-1) for b in (boxes_N4, others_M4)]
    either_NM = areas[0][:, None] + areas[1][None, :] - shared_NM
    return torch.where(either_NM > 0, shared_NM / either_NM.clamp(min=1e-12), torch.zeros_like(shared_NM))


def box_ap(answers: Sequence[Detections | None], truths: Sequence[Detections]) -> dict[str, float]:
    """COCO's box AP of answers on pictures, by the names of ``STATS``; -1 where there is no true box of that size.

    ``answers``: None where there was none. Scores of the truths do not count.

    Raises:
        MissingExtraError: pycocotools is not installed.
        InputError: not one answer per truth, or no true box at all.
    """
    coco_class, eval_class = _pycocotools()
    if len(answers) != len(truths):
        raise InputError(f"{len(answers)} answers for {len(truths)} pictures; give one for each (None for no answer)")
    labels = sorted({int(label) for truth in truths for label in truth.labels_N})
    if not labels:
        raise InputError("there is no true box in any picture, so that AP is not defined")
    images = [{"id": n} for n in range(len(truths))]
    categories = [{"id": label} for label in labels]
    true_boxes = [
        {"id": number, "image_id": image, "iscrowd": 0, **box}
        for number, (image, box) in enumerate(_records(truths, labels), start=1)
    ]
    found = [{"image_id": image, **box} for image, box in _records(answers, labels)]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        truth = coco_class()
        truth.dataset = {"images": images, "categories": categories, "annotations": true_boxes}
        truth.createIndex()
        if not found:
            return dict.fromkeys(STATS, 0.0)
        evaluation = eval_class(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(STATS, map(float, evaluation.stats[: len(STATS)]), strict=True))


def _records(pictures: Sequence[Detections | None], labels: Sequence[int]) -> list[tuple[int, dict[str, Any]]]:
    """(picture, box as x, y, width, height) of all boxes of known classes."""
    rows = []
    for image, picture in enumerate(pictures):
        for box, score, label in zip(*(t.tolist() for t in picture), strict=True) if picture else ():
            x, y, x_max, y_max = box
            if label in labels:
                sides = x_max - x, y_max - y
                rows.append(
                    (
                        image,
                        {
                            "category_id": label,
                            "bbox": [x, y, *sides],
                            "area": sides[0] * sides[1],
                            "score": score,
                        },
                    )
                )
    return rows


def _pycocotools() -> tuple[Any, Any]:
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise MissingExtraError("pycocotools", "coco", "box average precision") from error
    return COCO, COCOeval
