"""Heat maps and points: maps that a net is to answer, points from maps by soft-argmax, and PCK, how many are right.

Targets are Gaussians: Tompson et al., "Joint training of a convolutional network and a graphical model for human pose
estimation" (NeurIPS 2014). Soft-argmax: Luvizon, Tabia, Picard, "Human pose regression by combining indirect part
detection and contextual information" (Computers & Graphics 2019), section 3.1.

PCK: Yang, Ramanan, "Articulated human detection with flexible mixtures of parts" (PAMI 2013). A point is right when it
lies within alpha times the size of the person; the size is max(height, width) of the box around the person's joints, or
the length of the torso. Differs from JHMDB's own evaluation, which takes the box of the puppet mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sidestream.errors import InputError, LayoutError


@dataclass(frozen=True, slots=True)
class PCK:
    """Shares of right points; a joint without any label counts in no share."""

    alpha: float
    num_points: int
    """Labelled points."""
    num_right: int
    per_joint: tuple[tuple[int, int], ...]
    """For each joint: (right, labelled)."""

    @property
    def share(self) -> float:
        """Right points over labelled points, of all joints together."""
        return self.num_right / max(1, self.num_points)

    @property
    def joint_shares(self) -> tuple[float | None, ...]:
        """For each joint its share; None where no point of it is labelled."""
        return tuple(right / labelled if labelled else None for right, labelled in self.per_joint)


def gaussian_maps(points_BP2_px: Tensor, map_size: tuple[int, int], cell_px: float, *, sigma_cells: float) -> Tensor:
    """Maps (..., P, H, W) that are 1 at the points and fall off as a Gaussian; the inverse of ``points_from_maps``.

    Args:
        points_BP2_px: x, y in pixels of the model's input; leading axes may be more or fewer than (B, P).
        map_size: (H, W) in cells.
        cell_px: width of a cell; the middle of the first cell is at ``cell_px / 2``.
        sigma_cells: standard deviation in cells.
    """
    height, width = map_size
    cells = points_BP2_px / cell_px - 0.5
    ys, xs = torch.arange(height, device=cells.device), torch.arange(width, device=cells.device)
    squared_x = (xs - cells[..., 0, None]) ** 2
    squared_y = (ys - cells[..., 1, None]) ** 2
    return torch.exp(-(squared_y[..., :, None] + squared_x[..., None, :]) / (2 * sigma_cells**2))


def points_from_maps(
    maps_BPHW: Tensor, cell_px: float, *, sharpness: float = 1.0, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Soft-argmax: the mean place of each map's softmax, and how sure it is.

    Args:
        maps_BPHW: logits; leading axes may be more or fewer than (B, P).
        cell_px: width of a cell in pixels of the model's input; the middle of the first cell is at ``cell_px / 2``.
        sharpness: the maps are multiplied by it; large values go to the plain argmax.
        window: only the cells at most so many cells from the largest one take part (along each axis); None: all.
            Without a window, a flat map's background draws the point to the middle of the picture.

    Returns:
        ``(points_BP2_px, scores_BP)``: x, y in pixels of the model's input; the largest value of the softmax (over the
        cells that take part). Differentiable.
    """
    if maps_BPHW.ndim < 2 or not maps_BPHW.is_floating_point() or maps_BPHW.numel() == 0:
        raise LayoutError(f"maps are {maps_BPHW.dtype} of shape {tuple(maps_BPHW.shape)}; expected float (B, P, H, W)")
    height, width = maps_BPHW.shape[-2:]
    logits = maps_BPHW.flatten(-2) * sharpness
    ys, xs = torch.arange(height, device=logits.device), torch.arange(width, device=logits.device)
    if window is not None:
        best = logits.argmax(-1, keepdim=True)
        far_y = (ys.repeat_interleave(width) - best // width).abs() > window
        far_x = (xs.repeat(height) - best % width).abs() > window
        logits = logits.masked_fill(far_y | far_x, float("-inf"))
    weights = torch.softmax(logits, dim=-1)
    maps = weights.unflatten(-1, (height, width))
    x = (maps.sum(-2) * (xs + 0.5)).sum(-1)
    y = (maps.sum(-1) * (ys + 0.5)).sum(-1)
    return torch.stack((x, y), dim=-1) * cell_px, weights.amax(-1)


def pck(
    points_NP2_px: Tensor,
    truth_NP2_px: Tensor,
    *,
    alpha: float = 0.2,
    labelled_NP: Tensor | None = None,
    torso: tuple[int, int] | None = None,
) -> PCK:
    """Count the points that are at most ``alpha`` times the person's size from the truth.

    Args:
        points_NP2_px: answers, x, y; NaN where there is none, which is wrong.
        truth_NP2_px: ground truth in the same pixels.
        labelled_NP: bool; points that count. All by default.
        torso: two joints whose distance is the size; by default it is max(height, width) of the labelled joints' box.

    Raises:
        LayoutError: shapes that do not fit together.
        InputError: alpha not above 0, or joints that do not exist.
    """
    if points_NP2_px.shape != truth_NP2_px.shape or truth_NP2_px.ndim != 3 or truth_NP2_px.shape[-1] != 2:
        raise LayoutError(
            f"points of shape {tuple(points_NP2_px.shape)}, truth of shape {tuple(truth_NP2_px.shape)}; "
            "expected (N, P, 2) of both"
        )
    if not alpha > 0:
        raise InputError(f"{alpha = }; give a share of the person's size above 0")
    truth = truth_NP2_px.double()
    if labelled_NP is None:
        labelled_NP = torch.ones(truth.shape[:2], dtype=torch.bool)
    size_N = _torso_px(truth, torso) if torso else _box_px(truth, labelled_NP)
    distance_NP = (points_NP2_px.double() - truth).norm(dim=-1)
    right_NP = (distance_NP <= alpha * size_N[:, None]) & labelled_NP  # NaN compares as false
    per_joint = tuple(zip(right_NP.sum(0).tolist(), labelled_NP.sum(0).tolist(), strict=True))
    return PCK(alpha, int(labelled_NP.sum()), int(right_NP.sum()), per_joint)


def _box_px(truth_NP2: Tensor, labelled_NP: Tensor) -> Tensor:
    """max(height, width) of the box around the labelled joints, (N,)."""
    outside = ~labelled_NP[..., None]
    largest = truth_NP2.masked_fill(outside, float("-inf")).amax(1)
    smallest = truth_NP2.masked_fill(outside, float("inf")).amin(1)
    return (largest - smallest).amax(-1)


def _torso_px(truth_NP2: Tensor, torso: tuple[int, int]) -> Tensor:
    num_joints = truth_NP2.shape[1]
    if not all(0 <= joint < num_joints for joint in torso):
        raise InputError(f"{torso = }; expected two joints of 0 to {num_joints - 1}")
    return (truth_NP2[:, torso[0]] - truth_NP2[:, torso[1]]).norm(dim=-1)
