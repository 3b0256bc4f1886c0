"""A tiny net, tiny data and a run on them; as a program, the run that the tests kill: ``tiny.py FOLDER RESUME``."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.data import ClipDataset, ClipOptions, synthetic_dataset
from sidestream.train import TrainConfig, TrainResult, fit
from sidestream.types import InputSpec

SPEC = InputSpec(size_px=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3, layout="BTCHW", num_frames=4)
CONFIG = TrainConfig(epochs=3, batch_size=8, lr=0.05, device="cpu", checkpoint_minutes=0.0, seed=3)
"""Checkpoint minutes 0: one after every update."""


class Tiny(nn.Module):
    """Two 3D convolutions with batch norm and dropout, so that there are buffers and randomness to restore."""

    def __init__(self, num_classes: int = 4, *, width: int = 6, dropout: float = 0.2) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, width, (3, 5, 5), (1, 2, 2), (1, 2, 2))
        self.norm = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, 2 * width, 3, (1, 2, 2), 1)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self.answers(clip_BTCHW).mean(1)

    def features(self, clip_BTCHW: Tensor) -> Tensor:
        maps = self.norm(self.conv1(clip_BTCHW.transpose(1, 2))).relu()
        return self.conv2(maps).relu().transpose(1, 2)

    def answers(self, clip_BTCHW: Tensor) -> Tensor:
        return self.head(self.drop(self.features(clip_BTCHW).mean((-2, -1))))


def tiny_net(seed: int = 0, **options: Any) -> Tiny:
    torch.manual_seed(seed)
    return Tiny(**options)


def tiny_data(part: str = "train", num_records: int = 40, **options: Any) -> ClipDataset:
    return synthetic_dataset(part=part, spec=SPEC, num_clips=num_records, options=ClipOptions(**options))


def tiny_fit(out: Any, *, resume: bool = False, net: nn.Module | None = None, **changes: Any) -> TrainResult:
    net = tiny_net() if net is None else net
    return fit(net, tiny_data(), tiny_data("test", 16), config=CONFIG.replace(**changes), out=out, resume=resume)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tiny_fit(sys.argv[1], resume=sys.argv[2] == "resume", epochs=int(sys.argv[3]), optimizer=sys.argv[4])
