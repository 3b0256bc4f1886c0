"""The layers of I3D, each with its streaming form on the same parameters (see ``i3d``). Maps here are B,C,T,H,W."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestream.nn.combine import Chain, Parallel, PerFrame
from sidestream.nn.conv3d import Conv3d
from sidestream.nn.pool import AvgPool3d, MaxPool3d
from sidestream.nn.steppable import Steppable

Triple = tuple[int, int, int]
"""Time, height, width."""
POOLED_FRAMES, POOLED_PX = 2, 7
"""Window of the last average pooling, in places of the last map."""


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's 'SAME' along one axis: blanks before and after, the odd one after."""
    num_outputs = -(-size // stride)
    total = max((num_outputs - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


@dataclass(frozen=True)
class Sliding:
    """How a window slides over time and space: 'SAME' padding; in time, if causal, all of it in the past."""

    kernel: Triple
    stride: Triple
    is_causal: bool = False

    def padded(self, maps_BCTHW: Tensor, blank_value: float = 0.0) -> Tensor:
        axes = zip(maps_BCTHW.shape[2:], self.kernel, self.stride, strict=True)
        pads = [same_padding(*axis) for axis in axes]
        if self.is_causal:
            pads[0] = self.stream_padding
        flat = [num_blanks for pair in reversed(pads) for num_blanks in pair]
        return F.pad(maps_BCTHW, flat, value=blank_value) if any(flat) else maps_BCTHW

    @property
    def stream_padding(self) -> tuple[int, int]:
        """Blank frames before and after a stream: those of any length that the stride divides."""
        kernel, stride = self.kernel[0], self.stride[0]
        return (kernel - 1, 0) if self.is_causal else same_padding(kernel * stride, kernel, stride)

    def space_padding(self, blank_value: float = 0.0) -> list[Steppable]:
        """The layer that pads the frames of a stream, where there is anything to pad."""
        return [] if max(self.kernel[1:]) == 1 else [PerFrame(SpacePadding(self, blank_value))]


class SpacePadding(nn.Module):
    """The part of ``Sliding`` that concerns one frame."""

    def __init__(self, window: Sliding, blank_value: float) -> None:
        super().__init__()
        self.window, self.blank_value = window, blank_value

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        (_, *kernel), (_, *stride) = self.window.kernel, self.window.stride
        rows = same_padding(maps_BCHW.shape[2], kernel[0], stride[0])
        columns = same_padding(maps_BCHW.shape[3], kernel[1], stride[1])
        return F.pad(maps_BCHW, [*columns, *rows], value=self.blank_value)


class Unit(nn.Module):
    """Convolution, batch norm (eps 1e-3), ReLU."""

    def __init__(self, in_channels: int, out_channels: int, window: Sliding) -> None:
        super().__init__()
        self.window = window
        self.conv3d = nn.Conv3d(in_channels, out_channels, window.kernel, window.stride, bias=False)
        self.bn = nn.BatchNorm3d(out_channels, eps=1e-3, momentum=0.01)

    def forward(self, maps_BCTHW: Tensor) -> Tensor:
        return F.relu_(self.bn(self.conv3d(self.window.padded(maps_BCTHW))))

    def streaming(self) -> Chain:
        conv = Conv3d.from_torch(self.conv3d, time_padding=self.window.stream_padding)
        return Chain(*self.window.space_padding(), conv, PerFrame(NormedFrames(self.bn)))


class NormedFrames(nn.Module):
    """Batch norm and ReLU of a unit, on frames."""

    def __init__(self, bn: nn.BatchNorm3d) -> None:
        super().__init__()
        self.bn = bn

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        return F.relu_(self.bn(maps_BCHW.unsqueeze(2)).squeeze(2))


class MaxPool(nn.Module):
    """Maximum over windows; padding never wins."""

    def __init__(self, window: Sliding) -> None:
        super().__init__()
        self.window = window

    def forward(self, maps_BCTHW: Tensor) -> Tensor:
        padded_BCTHW = self.window.padded(maps_BCTHW, float("-inf"))
        return F.max_pool3d(padded_BCTHW, self.window.kernel, self.window.stride)

    def streaming(self) -> Chain:
        window = self.window
        pool = MaxPool3d(window.kernel, stride=window.stride, time_padding=window.stream_padding)
        return Chain(*window.space_padding(float("-inf")), pool)


class Mixed(nn.Module):
    """Four branches side by side: 1x1, 1x1 and 3x3 twice, pooling and 1x1; joined along the channels."""

    def __init__(self, in_channels: int, channels: tuple[int, ...], window: Sliding) -> None:
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = channels
        point = replace(window, kernel=(1, 1, 1))
        self.b0 = Unit(in_channels, b0, point)
        self.b1a, self.b1b = Unit(in_channels, b1a, point), Unit(b1a, b1b, window)
        self.b2a, self.b2b = Unit(in_channels, b2a, point), Unit(b2a, b2b, window)
        self.b3a, self.b3b = MaxPool(window), Unit(in_channels, b3b, point)

    def forward(self, maps_BCTHW: Tensor) -> Tensor:
        x = maps_BCTHW
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], dim=1)

    def streaming(self) -> Parallel:
        pairs = ((self.b1a, self.b1b), (self.b2a, self.b2b), (self.b3a, self.b3b))
        branches = [Chain(first.streaming(), second.streaming()) for first, second in pairs]
        return Parallel(self.b0.streaming(), *branches, combine="concat")


TrunkLayer = Unit | MaxPool | Mixed


class Logits(nn.Module):
    """Average pooling of 2 x 7 x 7 places, then a 1x1 convolution: one row of logits per step in time."""

    def __init__(self, in_channels: int, num_classes: int, *, is_causal: bool) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, num_classes, 1)
        self.time_padding = (POOLED_FRAMES - 1, 0) if is_causal else (0, 0)

    def forward(self, maps_BCTHW: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, T', num_classes)."""
        padded_BCTHW = F.pad(maps_BCTHW, [0, 0, 0, 0, *self.time_padding]) if any(self.time_padding) else maps_BCTHW
        kernel = (POOLED_FRAMES, *_pooled_px(maps_BCTHW))
        return self.conv3d(F.avg_pool3d(padded_BCTHW, kernel, stride=1)).mean((3, 4)).transpose(1, 2)

    def streaming(self) -> Chain:
        pool = AvgPool3d((POOLED_FRAMES, 1, 1), stride=1, time_padding=self.time_padding)
        return Chain(PerFrame(PooledFrames()), pool, PerFrame(FrameLogits(self.conv3d)))


class PooledFrames(nn.Module):
    """The part of the last pooling that concerns one frame."""

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        return F.avg_pool2d(maps_BCHW, _pooled_px(maps_BCHW), stride=1)


class FrameLogits(nn.Module):
    """The last convolution, on frames; averaged where the frame is larger than its window."""

    def __init__(self, conv3d: nn.Conv3d) -> None:
        super().__init__()
        self.conv3d = conv3d

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        return self.conv3d(maps_BCHW.unsqueeze(2)).mean((2, 3, 4))


def trunk_layer(in_channels: int, channels: tuple[int, ...], window: Sliding) -> tuple[TrunkLayer, int]:
    """A convolution (1 number of channels), mixed block (6) or pooling (0), and how many channels it answers with."""
    if not channels:
        return MaxPool(window), in_channels
    if len(channels) == 1:
        return Unit(in_channels, channels[0], window), channels[0]
    b0, _, b1b, _, b2b, b3b = channels
    return Mixed(in_channels, channels, window), b0 + b1b + b2b + b3b


def _pooled_px(maps: Tensor) -> tuple[int, int]:
    """(height, width) of the last pooling's window on maps of this size."""
    return min(POOLED_PX, maps.shape[-2]), min(POOLED_PX, maps.shape[-1])
