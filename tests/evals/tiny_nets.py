"""Nets whose memory, operations and causality are known, made by name in other processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

KEPT_MIB = 160


class KeepsSteps(nn.Module):
    """Multiplies 10 times by a learnt number. Going back needs the input of each product: 10 times 16 MiB, here."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.ones(10))

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        big = clip_BTCHW.mean().expand(1, 4 * 2**20) + 0.0  # 16 MiB
        for gain in self.gains:
            big = big * gain
        return big[:, :5]


def keeps_steps() -> nn.Module:
    return KeepsSteps()


def too_big() -> nn.Module:
    raise MemoryError("no such machine")
