"""The nets and clips that are measured: rows of equal stages, VGG-8 in groups of layers, real clips of JHMDB."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.data.jhmdb import jhmdb_records
from sidestream.models import create_model
from sidestream.types import Clip, InputSpec
from sidestream.video.prepare import prepare
from sidestream.video.read import read

NUM_CLASSES = 21


def row(num_stages: int, width: int = 32) -> list[nn.Module]:
    """Stages of two convolutions, all of one width and one size of map; then a mean over it and a linear layer."""
    stages = [
        nn.Sequential(
            nn.Conv2d(3 if n == 0 else width, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU()
        )
        for n in range(num_stages)
    ]
    stages[-1].extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, NUM_CLASSES)])
    return list(stages)


def vgg(name: str) -> list[nn.Module]:
    """The eight layers of VGG-8."""
    return list(create_model(name, num_classes=NUM_CLASSES).depth_modules())  # type: ignore[operator]


def make(net: dict[str, Any]) -> list[nn.Module]:
    """A net's stages from plain values, the same in every process: ``{"row": 4}``; ``{"vgg": "vgg8", "splits": [3]}``
    with the layers in groups that end there; also "width" of a row, "dtype", "seed"."""
    torch.manual_seed(net.get("seed", 0))
    layers = row(net["row"], net.get("width", 32)) if "row" in net else vgg(net["vgg"])
    if net.get("splits"):
        ends = [0, *net["splits"], len(layers)]
        layers = [nn.Sequential(*layers[a:b]) for a, b in itertools.pairwise(ends)]
    return [layer.to(getattr(torch, net.get("dtype", "float32"))).train() for layer in layers]


def random_frames(num_frames: int, size_px: int, dtype: str = "float32", seed: int = 1) -> tuple[Tensor, Tensor]:
    """Noise and labels, the same in every process: frames (T, 3, H, W) and labels (T,)."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.rand(num_frames, 3, size_px, size_px, generator=generator, dtype=torch.float64) * 2 - 1
    return frames.to(getattr(torch, dtype)), torch.randint(NUM_CLASSES, (num_frames,), generator=generator)


def jhmdb_clips(num_clips: int, num_frames: int, size_px: int) -> list[tuple[str, Tensor, int]]:
    """(key, frames (T, 3, H, W), label) of the first test clips of split 1 that are long enough, one per class."""
    parts, _ = jhmdb_records(Path(os.environ["SIDESTREAM_DATA"]) / "jhmdb", "1")
    spec = InputSpec(size_px=(size_px, size_px), mean=(0.5,) * 3, std=(0.25,) * 3, layout="BTCHW")
    found: dict[int, tuple[str, Tensor, int]] = {}
    for record in sorted(parts["test"], key=lambda r: r.key or ""):
        if record.label in found:
            continue
        clip: Clip = read(record.path)
        if len(clip.pts_seconds) >= num_frames:
            found[record.label] = (str(record.key), prepare(clip, spec)[0, :num_frames], record.label)
        if len(found) == num_clips:
            break
    return list(found.values())
