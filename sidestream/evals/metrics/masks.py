"""Mask IoU: the area that two masks share over the area that either covers."""

from __future__ import annotations

from torch import Tensor

from sidestream.errors import LayoutError


def mask_iou(answer_HW: Tensor, truth_HW: Tensor) -> float:
    """0 to 1 for two bool masks of one size; 1 where both are empty."""
    if answer_HW.shape != truth_HW.shape or answer_HW.dtype.is_floating_point or truth_HW.dtype.is_floating_point:
        raise LayoutError(
            f"masks are {answer_HW.dtype} of shape {tuple(answer_HW.shape)} and {truth_HW.dtype} of shape "
            f"{tuple(truth_HW.shape)}; expected two bool masks of one size (threshold and resize them first)"
        )
    answer, truth = answer_HW.bool(), truth_HW.bool()
    either = int((answer | truth).sum())
    return int((answer & truth).sum()) / either if either else 1.0
