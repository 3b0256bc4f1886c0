"""The synthetic set: one shape crosses the picture; its class is where it goes, what it is, or both. Needs no files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sidestream.data.dataset import PLAIN, ClipDataset, ClipOptions, Part
from sidestream.data.joints import PointSource
from sidestream.data.record import ClipRecord
from sidestream.data.sampling import random_generator
from sidestream.errors import InputError
from sidestream.types import InputSpec
from sidestream.video import SHAPE_NAMES, SyntheticVideo

DIRECTIONS = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "down": (0.0, 1.0), "up": (0.0, -1.0)}
"""Class -> velocity, x and y."""
SYNTHETIC: dict[str, tuple[str, ...]] = {
    "synthetic": tuple(DIRECTIONS),
    "synthetic_shapes": SHAPE_NAMES,
    "synthetic_both": tuple(f"{shape} {direction}" for shape in SHAPE_NAMES for direction in DIRECTIONS),
}
"""Name -> classes. In a single frame of "synthetic" nothing but the position hints at the class."""
NUM_CLIPS = {"train": 320, "test": 128}
FRAME_RATE = 25.0
POINTS = ("centre", "outline 1", "outline 2", "outline 3", "outline 4")
NUM_FRAMES_LONGER = 8
"""Videos are so many frames longer than a clip, for random starts."""


def synthetic_dataset(
    name: str = "synthetic",
    *,
    part: Part = "train",
    spec: InputSpec = PLAIN,
    options: ClipOptions = ClipOptions(),  # noqa: B008 (frozen)
    num_clips: int | None = None,
    with_points: bool = False,
) -> ClipDataset:
    """``num_clips`` made-up clips (default 320 for training, 128 for test), classes in turn.

    The videos are drawn by ``options.seed``; those of the two parts have nothing in common. They are made in the
    spec's own size, so that nothing is resized (but for random crops). ``with_points``: items hold the five keypoints
    of the shape; they have no left and right, so mirrored pictures keep their order.
    """
    classes = SYNTHETIC[name]
    count = NUM_CLIPS[part] if num_clips is None else num_clips
    if count < 1:
        raise InputError(f"{num_clips = }; give 1 or more")
    records = [ClipRecord(f"{name}:{part}:{n}", n % len(classes), key=f"{part}/{n}") for n in range(count)]
    pictures = _Pictures(name, part, spec, options.seed)
    return ClipDataset(
        records,
        classes,
        part=part,
        spec=spec,
        options=options,
        name=f"{name}, {part} part",
        open_pictures=pictures,
        points=PointSource(pictures.points, POINTS) if with_points else None,
    )


class _Pictures:
    """Reads a record of the set: makes its video."""

    def __init__(self, name: str, part: Part, spec: InputSpec, seed: int) -> None:
        self.name, self.part, self.spec, self.seed = name, part, spec, seed
        self.num_frames = (spec.num_frames - 1) * spec.frame_step + 1 + NUM_FRAMES_LONGER

    def __call__(self, record: ClipRecord, from_seconds: float) -> Iterator[tuple[Tensor, float]]:
        for frame in self.video(record):
            yield frame.rgb_HWC, frame.pts_seconds

    def points(self, record: ClipRecord) -> Tensor:
        """The shape's keypoints in every frame, as shares of width and height."""
        video, (height, width) = self.video(record), self.spec.size_px
        seconds = [n / video.frame_rate for n in range(self.num_frames)]
        points_FP2 = torch.stack([torch.as_tensor(video.shapes[0].keypoints_px(s, video.size_px)) for s in seconds])
        return points_FP2.float() / torch.tensor([width, height], dtype=torch.float32)

    def video(self, record: ClipRecord) -> SyntheticVideo:
        number = int(record.path.rpartition(":")[2])
        chance = random_generator(self.seed, 0 if self.part == "train" else 1, number)
        num_frames = self.num_frames
        video = SyntheticVideo(
            seed=int(chance.integers(2**31)),
            num_frames=num_frames,
            size_px=self.spec.size_px,
            frame_rate=FRAME_RATE,
            num_objects=1,
            speed=0.0,
        )
        words = SYNTHETIC[self.name][record.label].split()
        shape_name = next((word for word in words if word in SHAPE_NAMES), None)
        direction = next((word for word in words if word in DIRECTIONS), None)
        shape = video.shapes[0]
        if shape_name is not None:
            shape = replace(shape, label=SHAPE_NAMES.index(shape_name))
        heading = DIRECTIONS[direction] if direction is not None else _any_heading(chance.uniform(0, 2 * math.pi))
        duration_seconds = num_frames / FRAME_RATE
        # Along each axis: go some share of the room between the walls, from a place that keeps it inside them.
        share = chance.uniform(0.5, 0.9)
        start, velocity = [], []
        for towards, length in zip(heading, reversed(self.spec.size_px), strict=True):
            low, high = shape.walls_px(length)
            way = towards * share * (high - low)
            start.append(chance.uniform(low - min(way, 0.0), high - max(way, 0.0)))
            velocity.append(way / duration_seconds)
        video.shapes = (replace(shape, start_px=(start[0], start[1]), velocity_px=(velocity[0], velocity[1])),)
        return video


def _any_heading(angle: float) -> tuple[float, float]:
    return math.cos(angle), math.sin(angle)
