"""Labelled clips for streaming evaluation: every frame, and what is true in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sidestream.data import ClipDataset, ClipRecord
from sidestream.data.joints import JHMDB_FILE, jhmdb_points
from sidestream.errors import InputError
from sidestream.evals.streaming.live import at_rate
from sidestream.evals.streaming.log import FrameTruth
from sidestream.evals.streaming.values import ClassLabel, Points, Value
from sidestream.types import Frame

Task = Literal["classes", "keypoints"]


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
        raise InputError(f"{dataset.name} has no keypoints; use jhmdb with {JHMDB_FILE} in its folder, or synthetic")
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
    return record.path.startswith("synthetic") or _joints_of(record) is not None


def _points_of(record: ClipRecord, frames: list[Frame]) -> list[Value]:
    if frames and frames[0].truth is not None:
        return [_labelled(f.truth.keypoints_NP2_px[0], f.size_px) for f in frames if f.truth is not None]
    joints_FP2 = _joints_of(record)
    assert joints_FP2 is not None  # records without joints were left out
    height, width = size_px = frames[0].size_px
    return [_labelled(points_P2, size_px) for points_P2 in joints_FP2 * torch.tensor([width, height])]


def _labelled(points_P2: Tensor, size_px: tuple[int, int]) -> Points:
    """Points outside of the picture are not labelled, as in training: they count nowhere."""
    points_P2, (height, width) = points_P2.float(), size_px
    is_inside_P = ((points_P2 >= 0) & (points_P2 < torch.tensor([width, height]))).all(1)
    return Points(points_P2, is_inside_P.float())


def _joints_of(record: ClipRecord) -> Tensor | None:
    """JHMDB's joints as shares of the picture's width and height; None for a record without."""
    folder = Path(record.path).parent.parent.parent  # JHMDB/videos/CLASS/NAME.mp4
    return jhmdb_points(folder).read(record) if (folder / JHMDB_FILE).is_file() else None
