"""A run that torchrun starts in several processes: ``two_processes.py FOLDER BATCH_SIZE``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from train.tiny import CONFIG, tiny_data

from sidestream.train import TrainResult, fit


class Plain(nn.Module):
    """No batch norm and no dropout: then two halves of a batch are the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv3d(3, 6, 3, (1, 2, 2), 1), nn.Conv3d(6, 12, 3, (1, 2, 2), 1)
        self.head = nn.Linear(12, 4)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        maps = self.conv2(self.conv1(clip_BTCHW.transpose(1, 2)).relu()).relu()
        return self.head(maps.mean((-3, -2, -1)))


def plain_fit(out: Any, batch_size: int) -> TrainResult:
    torch.manual_seed(0)
    config = CONFIG.replace(batch_size=batch_size, epochs=2, accumulate=2, clip_norm=0.5)
    return fit(Plain(), tiny_data(), tiny_data("test", 16), config=config, out=out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    plain_fit(sys.argv[1], int(sys.argv[2]))
