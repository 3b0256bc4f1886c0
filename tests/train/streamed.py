"""A small net whose stream carries a state."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from train.layered import NUM_CLASSES

from sidestream.nn.combine import Chain, PerFrame
from sidestream.nn.recurrent import GRU, ConvGRU


class Recurrent(nn.Module):
    """Answers every frame, or as ``temporal`` says."""

    def __init__(self, *temporal: nn.Module) -> None:
        super().__init__()
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, NUM_CLASSES))
        self.chain = Chain(ConvGRU(3, 4), *temporal, PerFrame(nn.Tanh()), PerFrame(pool), GRU(NUM_CLASSES, NUM_CLASSES))

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self.answers(clip_BTCHW).mean(1)

    def answers(self, clip_BTCHW: Tensor) -> Tensor:
        return self.chain(clip_BTCHW)

    def streaming(self) -> Chain:
        return self.chain


def recurrent(*temporal: nn.Module) -> Recurrent:
    torch.manual_seed(0)
    return Recurrent(*temporal).double()
