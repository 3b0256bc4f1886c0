"""Boxes of the near future: a constant-velocity Kalman filter per object, greedy IoU association between frames.

Li, Wang, Ramanan, "Towards Streaming Perception" (ECCV 2020), section 3.3 and appendix. The state of a box is
(left, top, width, height) and their velocities in pixels a frame. Tracks are values: ``observe`` gives new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sidestream.evals.metrics.boxes import box_iou
from sidestream.evals.streaming.values import Boxes

PROCESS_VARIANCE, MEASUREMENT_VARIANCE, FIRST_VARIANCE = 1.0, 10.0, 100.0
"""Q = dt^2 * 1, R = 10, P0 = 100, each times the identity."""
MIN_IOU = 0.3
MIN_AREA_PX = 75
H = torch.eye(4, 8, dtype=torch.float64)
"""What is measured: the first four of the state."""


@dataclass(frozen=True, slots=True, eq=False)
class Track:
    """One object: Gaussian over its state (8,), with its class and the score of its last detection."""

    mean_8: Tensor
    covariance_88: Tensor
    label: int
    score: float


def transition(dt_frames: float) -> Tensor:
    """F (8, 8): position += dt * velocity."""
    matrix = torch.eye(8, dtype=torch.float64)
    matrix[:4, 4:] = dt_frames * torch.eye(4, dtype=torch.float64)
    return matrix


def predict(track: Track, dt_frames: float) -> Track:
    """The state ``dt_frames`` later, less certain."""
    matrix = transition(dt_frames)
    noise = dt_frames**2 * PROCESS_VARIANCE * torch.eye(8, dtype=torch.float64)
    return replace(track, mean_8=matrix @ track.mean_8, covariance_88=matrix @ track.covariance_88 @ matrix.T + noise)


def correct(track: Track, ltwh_4: Tensor) -> Track:
    """The state after a measurement of left, top, width, height."""
    noise = MEASUREMENT_VARIANCE * torch.eye(4, dtype=torch.float64)
    innovation_44 = H @ track.covariance_88 @ H.T + noise
    gain_84 = torch.linalg.solve(innovation_44, H @ track.covariance_88).T
    mean_8 = track.mean_8 + gain_84 @ (ltwh_4.double() - H @ track.mean_8)
    return replace(
        track, mean_8=mean_8, covariance_88=(torch.eye(8, dtype=torch.float64) - gain_84 @ H) @ track.covariance_88
    )


def start(ltwh_4: Tensor, label: int, score: float) -> Track:
    """A new object, at rest."""
    mean_8 = torch.cat([ltwh_4.double(), torch.zeros(4, dtype=torch.float64)])
    return Track(mean_8, FIRST_VARIANCE * torch.eye(8, dtype=torch.float64), label, score)


def observe(
    tracks: Sequence[Track], boxes: Boxes, dt_frames: float, *, moves_before_matching: bool = True
) -> list[Track]:
    """Tracks after the detections of a frame ``dt_frames`` later: corrected where matched, else dropped; and new ones.

    ``moves_before_matching``: detections are matched with where the tracks should be now; False: with where they were.
    """
    moved = [predict(track, dt_frames) for track in tracks]
    matches = associate(moved if moves_before_matching else tracks, boxes)
    measured = as_ltwh(boxes.boxes_N4_px)
    found = []
    for number, match in enumerate(matches):
        label, score = int(boxes.labels_N[number]), float(boxes.scores_N[number])
        if match is None:
            found.append(start(measured[number], label, score))
        else:
            found.append(replace(correct(moved[match], measured[number]), score=score))
    return found


def associate(tracks: Sequence[Track], boxes: Boxes) -> list[int | None]:
    """For each detection the track that it continues: greedily by score, same class, best IoU of 0.3 or more."""
    matches: list[int | None] = [None] * len(boxes.boxes_N4_px)
    if not tracks:
        return matches
    iou_NM = box_iou(boxes.boxes_N4_px.double(), boxes_of(tracks))
    labels_M = torch.tensor([track.label for track in tracks])
    iou_NM = iou_NM.masked_fill(boxes.labels_N[:, None] != labels_M[None], -1.0)
    for number in torch.argsort(boxes.scores_N, descending=True, stable=True).tolist():
        best = int(iou_NM[number].argmax())
        if iou_NM[number, best] >= MIN_IOU:
            matches[number] = best
            iou_NM[:, best] = -1.0
    return matches


def extrapolate(tracks: Sequence[Track], dt_frames: float, *, size_px: tuple[int, int] | None = None) -> Boxes:
    """Where the objects should be ``dt_frames`` from now: x + dt v.

    ``size_px``: (height, width) of the frame; boxes are clipped to it, and those of less than 75 whole pixels of area
    are left out.
    """
    boxes_N4 = boxes_of([replace(t, mean_8=transition(dt_frames) @ t.mean_8) for t in tracks])
    scores_N = torch.tensor([t.score for t in tracks], dtype=torch.float32)
    labels_N = torch.tensor([t.label for t in tracks], dtype=torch.int64)
    if size_px is not None:
        height, width = size_px
        limit = boxes_N4.new_tensor([width, height, width, height])
        boxes_N4 = torch.minimum(boxes_N4.clamp(min=0.0), limit)
        area_N = (boxes_N4[:, 2:] - boxes_N4[:, :2]).clamp(min=0).prod(-1)
        kept = area_N.floor() >= MIN_AREA_PX
        boxes_N4, scores_N, labels_N = boxes_N4[kept], scores_N[kept], labels_N[kept]
    return Boxes(boxes_N4.float(), scores_N, labels_N)


def as_ltwh(boxes_N4_px: Tensor) -> Tensor:
    """Corners to left, top, width, height; float64."""
    boxes = boxes_N4_px.double()
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)


def boxes_of(tracks: Sequence[Track]) -> Tensor:
    """Corners (N, 4) of the tracks' boxes, float64."""
    if not tracks:
        return torch.zeros(0, 4, dtype=torch.float64)
    state_N8 = torch.stack([track.mean_8 for track in tracks])
    return torch.cat([state_N8[:, :2], state_N8[:, :2] + state_N8[:, 2:4]], dim=1)
