"""What ``sidestream demo --latency`` shows: the clip, what is true in it, and what counts as the model's answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sidestream.errors import InputError, SourceError
from sidestream.evals.streaming import Boxes, Classes, ClassLabel, FrameTruth, Points
from sidestream.evals.streaming.pairing import Pair
from sidestream.types import Frame
from sidestream.video.shapes import SHAPE_NAMES

CLIP = "clip"
SPEED = 1.5
SEED = 7


@dataclass(frozen=True)
class Subject:
    """The clip in memory, its frames at even times, and what is true in them where that is known."""

    frames: tuple[Frame, ...]
    frame_rate: float
    boxes: tuple[Boxes, ...] | None = None
    points: tuple[Points, ...] | None = None
    """Of the first object."""

    def truths(self, values: Sequence[Any]) -> list[FrameTruth]:
        """One per frame."""
        return [FrameTruth(CLIP, f.index, f.pts_seconds, v) for f, v in zip(self.frames, values, strict=True)]


def synthetic_subject(num_frames: int, frame_rate: float, size_px: tuple[int, int]) -> Subject:
    """Fast shapes, with their boxes and the first one's keypoints."""
    from sidestream.video import SyntheticVideo

    video = SyntheticVideo(seed=SEED, num_frames=num_frames, size_px=size_px, frame_rate=frame_rate, speed=SPEED)
    frames, boxes, points = [], [], []
    for frame in video:
        assert frame.truth is not None  # made-up frames have it
        boxes.append(visible_boxes(frame.truth.boxes_N4_px, frame.truth.labels_N))
        corners_P2 = frame.truth.keypoints_NP2_px[0]
        points.append(Points(corners_P2, torch.ones(len(corners_P2))))
        frames.append(replace(frame, truth=None))
    return Subject(tuple(frames), frame_rate, tuple(boxes), tuple(points))


def file_subject(source: str, num_frames: int, frame_rate: float | None, size_px: tuple[int, int]) -> Subject:
    """The beginning of a video, scaled to fit into ``size_px``, at its own nominal rate or the given one."""
    from sidestream.evals.streaming import at_rate
    from sidestream.video import stream
    from sidestream.video.letterbox import fitted_box, letterbox

    def scaled(frame: Frame) -> Frame:
        box = fitted_box(frame.size_px, size_px)
        return replace(frame, rgb_HWC=torch.from_numpy(letterbox(frame.rgb_HWC.numpy(), (box.height, box.width))))

    with stream(source, max_frames=num_frames) as opened:
        rate = frame_rate or opened.info.frame_rate or 25.0
        frames = at_rate((scaled(frame) for frame in opened), rate)
    if len(frames) < 2:
        raise SourceError(f"{source} gave {len(frames)} frames; give a video with 2 or more")
    return Subject(tuple(frames), rate)


def visible_boxes(boxes_N4_px: Any, labels_N: Any) -> Boxes:
    """Boxes of the objects that are not hidden, all with score 1."""
    is_there = boxes_N4_px[:, 2] > boxes_N4_px[:, 0]
    return Boxes(boxes_N4_px[is_there], torch.ones(int(is_there.sum())), labels_N[is_there])


@dataclass(frozen=True)
class Answering:
    """What the model answers. ``of_output`` reads what it computed; without it, answers are looked up by frame."""

    kind: str
    """"oracle", "classes", "points" or "none"."""
    note: str
    """A line of the caption."""
    draw: Callable[[Any], Mapping[str, Any]]
    """From an answer's value to keyword arguments of ``video.overlay``."""
    of_output: Callable[[Any], Any] | None = None
    by_frame: Sequence[Any] = ()

    def __call__(self, output: Any) -> Any:
        return self.by_frame[output.frame_index] if self.of_output is None else self.of_output(output)


def answering(subject: Subject, plan: Any, weights: str | None) -> Answering:
    """The model's own answers where weights were given; else the truth, where it is known, or nothing at all."""
    from sidestream.cli.answers import draw_points
    from sidestream.evals.streaming.judge import classes_answer, points_answer

    if weights is None and subject.boxes is not None:
        note = (
            "Each answer is the exact truth of the frame that the model was given (an oracle); only its time is real."
        )
        return Answering("oracle", note, draw_boxes, by_frame=subject.boxes)
    if weights is None:
        note = "No answers are drawn (random weights); the corner shows the frame that the newest answer is about."
        return Answering("none", note, lambda value: {}, by_frame=[Classes(())] * len(subject.frames))
    if plan.has_points:
        note = f"The points are {plan.circuit.name}'s own answers."
        return Answering("points", note, draw_points, points_answer(plan.input_spec))

    def draw_classes(value: Classes) -> Mapping[str, Any]:
        names = [plan.labels[label] if plan.labels else f"class {label}" for label, _ in value.top]
        return {"labels": names[:3]}

    note = f"The classes are {plan.circuit.name}'s own answers; the corner shows the frame that they are about."
    return Answering("classes", note, draw_classes, classes_answer())


def truth_of(subject: Subject, answers: Answering, offline: Sequence[Any] | None) -> tuple[list[FrameTruth], str]:
    """The truth by which answers are judged, and what it is; the model's own offline answers where nothing is known."""
    if answers.kind == "oracle" and subject.boxes is not None:
        return subject.truths(subject.boxes), "the exact truth"
    if answers.kind == "none" or offline is None:
        return [], ""
    if answers.kind == "points" and subject.points is not None and _same_points(subject.points, offline):
        return subject.truths(subject.points), "the exact keypoints of one shape"
    values = [ClassLabel(v.top[0][0]) if isinstance(v, Classes) else _as_truth(v) for v in offline]
    return subject.truths(values), "the model's own offline answers"


def draw_boxes(value: Boxes) -> Mapping[str, Any]:
    """A box per class, in the class's own colour."""
    boxes_N4 = torch.zeros(len(SHAPE_NAMES), 4)
    boxes_N4[value.labels_N] = value.boxes_N4_px
    return {"boxes_N4_px": boxes_N4, "box_labels": SHAPE_NAMES}


def mean_iou(pairs: Sequence[Pair]) -> float:
    """Mean over all true boxes of their overlap with the answer's box of the same class; 0 where it has none."""
    overlaps = []
    for p in pairs:
        truth: Any = p.truth.value
        found: Any = None if p.answer is None else p.answer.value
        for box, label in zip(truth.boxes_N4_px, truth.labels_N, strict=True):
            same = [] if found is None else [b for b, x in zip(found.boxes_N4_px, found.labels_N) if x == label]
            overlaps.append(max((_iou(box.tolist(), b.tolist()) for b in same), default=0.0))
    if not overlaps:
        raise InputError("there is no true box to judge by; give a clip in which an object can be seen")
    return sum(overlaps) / len(overlaps)


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    across, down = (max(0.0, min(a[n + 2], b[n + 2]) - max(a[n], b[n])) for n in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return across * down / (sum(areas) - across * down)


def _same_points(truths: Sequence[Points], offline: Sequence[Points]) -> bool:
    return len(truths[0].points_P2_px) == len(offline[0].points_P2_px)


def _as_truth(points: Points) -> Points:
    return Points(points.points_P2_px, torch.ones_like(points.scores_P))
