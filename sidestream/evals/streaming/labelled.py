"""Labelled clips for streaming evaluation: every frame, and what is true in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sidestream.data import ClipDataset, ClipRecord
from sidestream.errors import InputError
from sidestream.evals.streaming.live import at_rate
from sidestream.evals.streaming.log import FrameTruth
from sidestream.evals.streaming.values import ClassLabel, Points, Value
from sidestream.types import Frame

Task = Literal["classes", "keypoints"]
JHMDB_JOINTS = "joints_px_609.npz"
"""In the folder of JHMDB: for each clip that has joints, (T, 15, 2) float32: x, y in pixels of 320 x 240 frames."""
JHMDB_WIDTH_PX = 320


@dataclass(frozen=True, slots=True)
class LabelledClip:
    """A clip in memory with the truth of its frames."""

    key: str
    frames: tuple[Frame, ...]
    truths: tuple[FrameTruth, ...]


def labelled_clips(
    dataset: ClipDataset, task: Task = "classes", *, frame_rate: float | None = None, max_clips: int | None = None
) -> Iterator[LabelledClip]:
    """The clips of a data set in order, one in memory at a time.

    "classes": every frame has its clip's class. "keypoints": the joints of JHMDB's clips (those without are left out),
    and the keypoints of the first object of a synthetic set.

    Args:
        frame_rate: show the frames at this rate, evenly; None: at the times at which they were recorded.
        max_clips: take so many, evenly spread over the set.

    Raises:
        InputError: not one clip has what the task needs.
    """
    records = [record for record in dataset.records if task == "classes" or _may_have_points(record)]
    if not records:
        raise InputError(f"{dataset.name} has no keypoints; use jhmdb with {JHMDB_JOINTS} in its folder, or synthetic")
    if max_clips is not None and max_clips < len(records):
        records = [records[n * len(records) // max_clips] for n in range(max_clips)]
    for record in records:
        frames = at_rate(dataset.frames(record), frame_rate)
        values = [ClassLabel(record.label)] * len(frames) if task == "classes" else _points_of(record, frames)
        truths = tuple(
            FrameTruth(record.name, frame.index, frame.pts_seconds, value)
            for frame, value in zip(frames, values, strict=False)
        )
        bare = tuple(replace(frame, truth=None) for frame in frames)
        yield LabelledClip(record.name, bare, truths)


def num_points(dataset: ClipDataset) -> int:
    """Keypoints of the data set's frames. Raises ``InputError`` as ``labelled_clips`` does."""
    clip = next(labelled_clips(dataset, "keypoints", max_clips=1))
    value: Any = clip.truths[0].value
    return len(value.points_P2_px)


def _may_have_points(record: ClipRecord) -> bool:
    joints = _jhmdb_joints(_joints_file(record))
    return record.path.startswith("synthetic") or (joints is not None and record.name in joints)


def _points_of(record: ClipRecord, frames: list[Frame]) -> list[Value]:
    if frames and frames[0].truth is not None:
        return [_labelled(frame.truth.keypoints_NP2_px[0]) for frame in frames if frame.truth is not None]
    joints = _jhmdb_joints(_joints_file(record))
    assert joints is not None  # records without joints were left out
    joints_TP2 = torch.from_numpy(joints[record.name]) * (frames[0].size_px[1] / JHMDB_WIDTH_PX)
    return [_labelled(points_P2) for points_P2 in joints_TP2]


def _labelled(points_P2: Tensor) -> Points:
    return Points(points_P2.float(), torch.ones(len(points_P2)))


def _joints_file(record: ClipRecord) -> Path:
    return Path(record.path).parent.parent.parent / JHMDB_JOINTS  # JHMDB/videos/CLASS/NAME.mp4


@cache
def _jhmdb_joints(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files}
