"""Mask IoU and top-1 by hand."""

from __future__ import annotations

import pytest
import torch

from sidestream.errors import InputError, LayoutError
from sidestream.evals.metrics import mask_iou, top_1


def test_mask_iou_by_hand():
    one, other = torch.zeros(6, 8, dtype=torch.bool), torch.zeros(6, 8, dtype=torch.bool)
    assert mask_iou(one, other) == 1.0
    one[0:4, 0:4] = True
    assert mask_iou(one, other) == 0.0
    other[2:6, 2:6] = True
    assert mask_iou(one, other) == 4 / 28
    assert mask_iou(one, one) == 1.0


def test_masks_of_another_size_or_type_are_refused():
    mask = torch.zeros(4, 4, dtype=torch.bool)
    with pytest.raises(LayoutError, match="expected two bool masks of one size"):
        mask_iou(mask, torch.zeros(4, 5, dtype=torch.bool))
    with pytest.raises(LayoutError, match="threshold"):
        mask_iou(mask.float(), mask)


def test_top_1_by_hand():
    assert top_1([1, None, 2, 0], [1, 0, 0, 0]) == 0.5
    with pytest.raises(InputError, match="1 answers for 2 labels"):
        top_1([1], [1, 2])
    with pytest.raises(InputError, match="at least one"):
        top_1([], [])
