"""Keypoints of records, frame by frame: JHMDB's joints, and the corners of a synthetic set's shape.

JHMDB's joints are read from ``joints_px_609.npz`` in its folder: for each of the 609 clips that have them, (T, 15, 2)
float32, x and y in pixels of the original 320 x 240 pictures, recovered from the normalised positions that JHMDB
publishes by matching the person's masks (approximate on 67 clips).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidestream.data.record import ClipRecord
from sidestream.errors import InputError

JHMDB_FILE = "joints_px_609.npz"
JHMDB_SIZE_PX = (240, 320)
"""Of the pictures in whose pixels the joints are."""
JHMDB_JOINTS = (
    "neck",
    "belly",
    "face",
    *(f"{side}_{part}" for part in ("shoulder", "hip", "elbow", "knee", "wrist", "ankle") for side in "rl"),
)
VISIBLE, HIDDEN = 1.0, 0.0


@dataclass(frozen=True, slots=True)
class PointSource:
    """Where the keypoints of a data set's records come from."""

    read: Callable[[ClipRecord], Tensor | None]
    """All frames of a record (F, P, 2), as shares of the picture's width and height: x, y, (0, 0) at its top left
    corner and (1, 1) at the bottom right one; None for a record without keypoints."""
    names: tuple[str, ...]
    swaps: tuple[tuple[int, int], ...] = ()
    """Pairs that change their places when the picture is mirrored: left and right."""


def jhmdb_points(folder: Path) -> PointSource:
    """Raises ``InputError`` where the file of joints is not in ``folder``."""
    file = folder / JHMDB_FILE
    if not file.is_file():
        raise InputError(f"{folder} has no {JHMDB_FILE}, which holds the joints; put it there, or train another task")

    def read(record: ClipRecord) -> Tensor | None:
        joints_TP2 = _arrays(file).get(record.name)
        if joints_TP2 is None:
            return None
        height, width = JHMDB_SIZE_PX
        return torch.from_numpy(joints_TP2).float() / torch.tensor([width, height], dtype=torch.float32)

    pairs = tuple((n, n + 1) for n in range(3, len(JHMDB_JOINTS), 2))
    return PointSource(read, JHMDB_JOINTS, pairs)


@cache
def _arrays(file: Path) -> dict[str, Any]:
    with np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def points_of_clip(
    points_FP2: Tensor,
    chosen: list[int],
    *,
    picture_px: tuple[int, int],
    corner_px: tuple[int, int],
    size_px: tuple[int, int],
    swaps: tuple[tuple[int, int], ...] | None,
) -> Tensor:
    """(T, P, 3): x, y in pixels of the clip's pictures (pixel i covers [i, i + 1)), and 1 where that is inside them.

    The pictures were resized to ``picture_px``, cut out at ``corner_px`` (top, left) with ``size_px``, and mirrored
    unless ``swaps`` is None. Frames beyond those that have keypoints have none that is visible.
    """
    (height, width), (top, left) = size_px, corner_px
    known = torch.tensor([index < len(points_FP2) for index in chosen])
    points_TP2 = points_FP2[[min(index, len(points_FP2) - 1) for index in chosen]]
    x = points_TP2[..., 0] * picture_px[1] - left
    y = points_TP2[..., 1] * picture_px[0] - top
    if swaps is not None:
        x = width - x
        order = list(range(x.shape[1]))
        for a, b in swaps:
            order[a], order[b] = order[b], order[a]
        x, y = x[:, order], y[:, order]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height) & known[:, None]
    return torch.stack([x, y, torch.where(inside, VISIBLE, HIDDEN)], dim=-1)
