"""The layers of X3D, each with its streaming form: squeeze-and-excitation over time, blocks, the two-layer head.

The published squeeze averages over all frames of the clip, later ones too, which no stream has. So there is a second
one, over the newest frames only, which is causal and streams.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestream.errors import ModelError
from sidestream.models.resnet3d_bottleneck import Bottleneck, InARow, Sliding, Unit, linear, relu
from sidestream.nn.combine import Chain, PerFrame
from sidestream.nn.pool import AvgPool3d
from sidestream.nn.steppable import Steppable

BOTTLENECK_FACTOR, SQUEEZE_RATIO = 2.25, 0.0625


class Squeeze(nn.Module):
    """``silu(x * gate)``, with one gate per channel made of the channels' means: over the whole clip where
    ``num_newest`` is None, or over space and the newest ``num_newest`` frames (at the start, those there are).

    Hu, Shen, Sun, "Squeeze-and-Excitation Networks" (CVPR 2018), section 3. Maps are B,C,T,H,W.
    """

    def __init__(self, num_channels: int, num_reduced: int, num_newest: int | None) -> None:
        super().__init__()
        self.num_newest = num_newest
        self.reduce = nn.Conv3d(num_channels, num_reduced, 1)
        self.expand = nn.Conv3d(num_reduced, num_channels, 1)

    def forward(self, maps_BCTHW: Tensor) -> Tensor:
        if self.num_newest is None:
            return self.gated(maps_BCTHW, maps_BCTHW.mean((2, 3, 4), keepdim=True))
        mean_BCT11 = maps_BCTHW.mean((3, 4), keepdim=True)
        past, window = [0, 0, 0, 0, self.num_newest - 1, 0], (self.num_newest, 1, 1)
        mean_BCT11 = F.avg_pool3d(F.pad(mean_BCT11, past), window, stride=1)
        num_frames = torch.arange(1, maps_BCTHW.shape[2] + 1, device=maps_BCTHW.device).clamp(max=self.num_newest)
        share_T11 = (num_frames.to(maps_BCTHW.dtype) / self.num_newest).reshape(-1, 1, 1)
        return self.gated(maps_BCTHW, mean_BCT11 / share_T11)

    def gated(self, maps_BCTHW: Tensor, mean_BCT11: Tensor) -> Tensor:
        return F.silu(maps_BCTHW * self.expand(F.relu(self.reduce(mean_BCT11))).sigmoid())

    def streaming(self) -> Steppable:
        if self.num_newest is None:
            raise ModelError(
                "this squeeze is over the whole clip, which a stream does not have; take StreamedX3D, or a model by "
                "name that ends in _causal"
            )
        return SqueezedFrames(self, self.num_newest)


class SqueezedFrames(Steppable):
    """A ``Squeeze`` over the newest frames, on streams. State: that of the mean."""

    def __init__(self, squeeze: Squeeze, num_newest: int) -> None:
        super().__init__()
        self.squeeze = squeeze
        pool = AvgPool3d((num_newest, 1, 1), stride=1, is_causal=True)
        self.mean = Chain(PerFrame(WithOnes()), pool, PerFrame(OverOnes()))

    def init_state(self, frame_BCHW: Tensor) -> Any:
        return self.mean.init_state(frame_BCHW[:, :, :1, :1])

    def step(self, frame_BCHW: Tensor, state: Any) -> tuple[Tensor, Any]:
        mean_BC11, state = self.mean.step(frame_BCHW.mean((2, 3), keepdim=True), state)
        return self.squeeze.gated(frame_BCHW.unsqueeze(2), mean_BC11.unsqueeze(2)).squeeze(2), state

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        mean_BTC11 = self.mean(clip_BTCHW.mean((3, 4), keepdim=True))
        return self.squeeze.gated(clip_BTCHW.transpose(1, 2), mean_BTC11.transpose(1, 2)).transpose(1, 2)


class WithOnes(nn.Module):
    """One more channel, of ones: its mean is the share of a window in which there are frames."""

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        return F.pad(maps_BCHW, [0, 0, 0, 0, 0, 1], value=1.0)


class OverOnes(nn.Module):
    """All channels but the last, divided by it."""

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        return maps_BCHW[:, :-1] / maps_BCHW[:, -1:]


class ProjectedHead(nn.Module):
    """Pooled features (..., C) to logits: a linear layer without bias, ReLU, dropout, the classifier."""

    def __init__(self, num_features: int, num_inner: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.Conv3d(num_features, num_inner, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.linear = linear(num_inner, num_classes)

    def forward(self, pooled_C: Tensor) -> Tensor:
        return self.linear(self.dropout(F.relu(F.linear(pooled_C, self.project.weight.flatten(1)))))


def round_width(width: float) -> int:
    """To the nearest multiple of 8, 8 at least; up where that loses more than a tenth (as pytorchvideo's rule)."""
    rounded = max(8, math.floor(width / 8 + 0.5) * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded


@dataclass(frozen=True)
class Plan:
    """How the layers see time, and how they are made."""

    squeeze_frames: int | None = None
    """Newest frames whose mean sets the gates; None: all of the clip, as published."""
    is_causal: bool = False
    """All temporal padding lies in the past."""

    def window(self, size_px: int, *, taps: int = 1, stride_px: int = 1) -> Sliding:
        return Sliding((taps, size_px, size_px), (1, stride_px, stride_px), self.is_causal)

    def stem(self, channels: int) -> InARow:
        space = Unit(3, channels, self.window(3, stride_px=2), has_norm=False)
        return InARow(space, Unit(channels, channels, self.window(1, taps=5), num_groups=channels, activation=relu()))

    def stage(self, in_channels: int, out_channels: int, depth: int) -> InARow:
        """The first block halves the maps; every second block, from the first on, has a squeeze."""
        first = self._block(in_channels, out_channels, stride_px=2, has_squeeze=True)
        rest = (self._block(out_channels, out_channels, stride_px=1, has_squeeze=n % 2 == 0) for n in range(1, depth))
        return InARow(first, *rest)

    def _block(self, in_channels: int, out_channels: int, *, stride_px: int, has_squeeze: bool) -> Bottleneck:
        inner, point = int(BOTTLENECK_FACTOR * out_channels), self.window(1)
        window = self.window(3, taps=3, stride_px=stride_px)
        activation = None if has_squeeze else nn.SiLU()
        is_wider = in_channels != out_channels
        strided = replace(point, stride=window.stride)
        return Bottleneck(
            Unit(in_channels, inner, point, activation=relu()),
            Unit(inner, inner, window, num_groups=inner, activation=activation),
            Unit(inner, out_channels, point),
            skip=Unit(in_channels, out_channels, strided, has_norm=is_wider) if is_wider or stride_px > 1 else None,
            middle=Squeeze(inner, round_width(inner * SQUEEZE_RATIO), self.squeeze_frames) if has_squeeze else None,
        )
