"""Tiny nets for moving shapes, trained here at speeds from slow to fast, and judged at growing speed on one device.

``par_densenet_tiny`` finds the five keypoints of one shape over a drifting background: in sequence first, then each
variant goes on from there, by the recipe's rule. Speed 1 crosses the picture in about 3 s, at 30 frames a second.
The centre is counted by itself too: the other points turn with the shape, and of a circle the angle cannot be seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from judging import MODEL, NETS, SIZE_PX, TWO_GROUPS, Device, Judge, ShownClip, load, tallied
from torch import Tensor

from sidestream.data import ClipDataset, ClipOptions
from sidestream.data.joints import PointSource
from sidestream.data.record import ClipRecord
from sidestream.data.sampling import random_generator
from sidestream.data.shapes import POINTS
from sidestream.evals.streaming import Points
from sidestream.models import create_model, model_info
from sidestream.train import TrainConfig, fit
from sidestream.video import SyntheticVideo

Record = dict[str, Any]
SPEEDS = (0.25, 0.5, 1.0, 2.0, 4.0)
FRAME_RATE = 30.0
NUM_FRAMES = 16
NUM_CLIPS = 320
NUM_VIDEOS, VIDEO_FRAMES = 24, 60
"""Per speed, for the test."""
CENTRE = POINTS.index("centre")
PRETRAINING, EPOCHS, DISTILL = 12, 4, 0.1
SPEC = model_info(MODEL).input_spec.replace(num_frames=NUM_FRAMES, frame_step=1, size_px=(SIZE_PX,) * 2, resize_px=None)
VARIANTS: dict[str, dict[str, Any]] = {
    "sequential": {"wiring": "sequential"},
    "two groups, distilled": {"wiring": TWO_GROUPS, "distill": DISTILL},
    "parallel, distilled": {"wiring": "parallel", "distill": DISTILL},
}


class Pictures:
    """Reads a record of the training set: makes its video, at a speed between the slowest and the fastest."""

    def __init__(self, seed: int) -> None:
        self.seed, self.num_frames = seed, NUM_FRAMES + 8

    def __call__(self, record: ClipRecord, from_seconds: float) -> Iterator[tuple[Tensor, float]]:
        for frame in self.video(record):
            yield frame.rgb_HWC, frame.pts_seconds

    def points(self, record: ClipRecord) -> Tensor:
        """As shares of width and height, of every frame."""
        video = self.video(record)
        return torch.stack([points_of(video, n) for n in range(self.num_frames)]) / SIZE_PX

    def video(self, record: ClipRecord) -> SyntheticVideo:
        part, number = record.path.split(":")[1:]
        chance = random_generator(self.seed, ("train", "test").index(part), int(number))
        speed = math.exp(chance.uniform(math.log(SPEEDS[0]), math.log(SPEEDS[-1])))
        return video_of(int(chance.integers(2**31)), self.num_frames, speed)


def video_of(seed: int, num_frames: int, speed: float) -> SyntheticVideo:
    return SyntheticVideo(seed, num_frames, (SIZE_PX, SIZE_PX), FRAME_RATE, num_objects=1, speed=speed)


def points_of(video: SyntheticVideo, number: int) -> Tensor:
    return torch.as_tensor(video.shapes[0].keypoints_px(number / video.frame_rate, video.size_px)).float()


def dataset(part: Any, seed: int, num_clips: int) -> ClipDataset:
    pictures = Pictures(seed)
    return ClipDataset(
        [ClipRecord(f"synthetic:{part}:{n}", 0, key=f"{part}/{n}") for n in range(num_clips)],
        ("shape",),
        part=part,
        spec=SPEC,
        options=ClipOptions(seed=seed),
        name=f"moving shapes, {part} part",
        open_pictures=pictures,
        points=PointSource(pictures.points, POINTS),
    )


def trained(seed: int, runs: Path, quick: bool) -> Path:
    """A folder with the weights of each variant, as the recipe leaves them; what is there is not trained again."""
    num_clips, pretraining, epochs = (16, 1, 1) if quick else (NUM_CLIPS, PRETRAINING, EPOCHS)
    data = dataset("train", seed, num_clips), dataset("test", seed, max(8, num_clips // 10))
    shared: dict[str, Any] = {"task": "keypoints", "optimizer": "adamw", "lr": 2e-3, "batch_size": 8, "num_workers": 0}
    first = runs / f"pretrained-{seed}"
    _fit(seed, data, TrainConfig(**shared, epochs=pretraining, seed=seed, evaluate_every=pretraining), first)
    for variant, options in VARIANTS.items():
        more = {"rule": "unrolled", "target": "newest", "teacher": str(first / "last.safetensors")}
        config = TrainConfig(**shared, **options, **more, epochs=epochs, seed=seed, evaluate_every=epochs)
        _fit(seed, data, config, runs / f"{seed}-{variant}" / "run")
    return runs


def _fit(seed: int, data: tuple[ClipDataset, ClipDataset], config: TrainConfig, out: Path) -> None:
    if (out / "done").is_file():
        return
    torch.manual_seed(seed)
    net = create_model(MODEL, num_classes=len(POINTS), head="keypoints")
    fit(net, *data, config=config, out=out, resume=(out / "config.json").is_file())
    (out / "done").touch()


def shown(speed: float, number: int) -> ShownClip:
    """A test video; its seed is none of the training set's (those are drawn)."""
    video = video_of(10_000 + number, VIDEO_FRAMES, speed)
    pixels_THWC = torch.stack([frame.rgb_HWC for frame in video]).float() / 255.0
    mean, std = (torch.tensor(values) for values in (SPEC.mean, SPEC.std))
    frames_TCHW = ((pixels_THWC - mean) / std).permute(0, 3, 1, 2).contiguous()
    truths = tuple(Points(points_of(video, n), torch.ones(len(POINTS))) for n in range(VIDEO_FRAMES))
    return ShownClip(f"{speed}:{number}", frames_TCHW, (SIZE_PX, SIZE_PX), truths, speed)


def measure(device: Device, runs: Path, seeds: Sequence[int], known: Sequence[Record], quick: bool) -> Iterator[Record]:
    """A record per seed, net and speed."""
    torch.set_num_threads(1)
    for seed in seeds:
        cases = [{"seed": seed, "net": name, "speed": speed} for name in NETS for speed in SPEEDS]
        if all(case in known for case in cases):
            continue
        folder = trained(seed, runs, quick)
        judge = Judge(lambda variant, s=seed, f=folder: load(f, f"{s}-{variant}", len(POINTS)), device)
        clips = [shown(speed, n) for speed in SPEEDS for n in range(2 if quick else NUM_VIDEOS)]
        for name, rate, tallies in tallied(judge, clips, (FRAME_RATE,), lambda clip: clip.motion, CENTRE):
            for speed, tally in tallies.items():
                case = {"seed": seed, "net": name, "speed": speed}
                if case not in known:
                    yield {"case": case, "frame_rate": rate, **tally.sums}
