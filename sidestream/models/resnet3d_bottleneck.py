"""The layers of 3D bottleneck ResNets, each with its streaming form on the same parameters. Maps here are B,C,T,H,W.

Shared by the Slow, C2D and I3D ResNets, SlowFast and X3D. Padding is half of the kernel, rounded down; in causal
variants all of the temporal padding lies in the past.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn import functional as F

from sidestream.nn.combine import Chain, PerFrame, Residual
from sidestream.nn.conv3d import CausalConv3d, Conv3d
from sidestream.nn.pool import MaxPool3d
from sidestream.nn.steppable import Steppable

Triple = tuple[int, int, int]
"""Time, height, width."""


@dataclass(frozen=True)
class Sliding:
    """How a window slides over time and space."""

    kernel: Triple
    stride: Triple = (1, 1, 1)
    is_causal: bool = False

    @property
    def padding(self) -> Triple:
        """Zeros on both ends of each axis; a causal window gets those of time from ``padded``."""
        time, height, width = (size // 2 for size in self.kernel)
        return (0 if self.is_causal else time, height, width)

    def padded(self, maps_BCTHW: Tensor, blank_value: float = 0.0) -> Tensor:
        """With the blank frames before the first that a causal window reads."""
        num_past = self.kernel[0] - 1 if self.is_causal else 0
        return F.pad(maps_BCTHW, [0, 0, 0, 0, num_past, 0], value=blank_value) if num_past else maps_BCTHW


@runtime_checkable
class Streamable(Protocol):
    """A module on clips (B, C, T, H, W) that knows its streaming form."""

    def __call__(self, maps_BCTHW: Tensor) -> Tensor: ...

    def streaming(self) -> Steppable: ...


class Unit(nn.Module):
    """Convolution without bias, batch norm (eps 1e-5), activation; ``activation`` None leaves that out."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        window: Sliding,
        *,
        num_groups: int = 1,
        has_norm: bool = True,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.window = window
        padding = window.padding
        self.conv = nn.Conv3d(
            in_channels, out_channels, window.kernel, window.stride, padding, groups=num_groups, bias=False
        )
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.norm = nn.BatchNorm3d(out_channels) if has_norm else None
        self.activation = activation

    def forward(self, maps_BCTHW: Tensor) -> Tensor:
        return self.tail(self.conv(self.window.padded(maps_BCTHW)))

    def tail(self, maps_BCTHW: Tensor) -> Tensor:
        """What follows the convolution."""
        maps_BCTHW = maps_BCTHW if self.norm is None else self.norm(maps_BCTHW)
        return maps_BCTHW if self.activation is None else self.activation(maps_BCTHW)

    def streaming(self) -> Chain:
        conv = CausalConv3d.from_torch(self.conv) if self.window.is_causal else Conv3d.from_torch(self.conv)
        has_tail = self.norm is not None or self.activation is not None
        return Chain(conv, PerFrame(FrameTail(self.norm, self.activation))) if has_tail else Chain(conv)


class FrameTail(nn.Module):
    """What follows the convolution of a unit, on frames."""

    def __init__(self, norm: nn.BatchNorm3d | None, activation: nn.Module | None) -> None:
        super().__init__()
        self.norm, self.activation = norm, activation

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        if self.norm is not None:
            maps_BCHW = self.norm(maps_BCHW.unsqueeze(2)).squeeze(2)
        return maps_BCHW if self.activation is None else self.activation(maps_BCHW)


class MaxPool(nn.Module):
    """Maximum over windows without padding in time (one frame's, or pairs of frames); padding never wins."""

    def __init__(self, window: Sliding) -> None:
        super().__init__()
        self.window = window
        self.padding = (0, *window.padding[1:])

    def forward(self, maps_BCTHW: Tensor) -> Tensor:
        padded_BCTHW = self.window.padded(maps_BCTHW, float("-inf"))
        return F.max_pool3d(padded_BCTHW, self.window.kernel, self.window.stride, self.padding)

    def streaming(self) -> MaxPool3d:
        window = self.window
        return MaxPool3d(
            window.kernel, stride=window.stride, padding=(0, *window.padding[1:]), is_causal=window.is_causal
        )


class InARow(nn.Sequential):
    """Streamable modules one after the other."""

    def streaming(self) -> Chain:
        return Chain(*(module.streaming() for module in self))  # type: ignore[operator]


class Bottleneck(nn.Module):
    """``relu(skip(x) + c(middle(b(a(x)))))``; ``skip`` None: x itself; ``middle``: what X3D has between b and c."""

    def __init__(
        self,
        a: nn.Module,
        b: nn.Module,
        c: nn.Module,
        *,
        skip: nn.Module | None = None,
        middle: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.a, self.b, self.middle, self.c, self.skip = a, b, middle, c, skip

    def forward(self, maps_BCTHW: Tensor) -> Tensor:
        branch_BCTHW = maps_BCTHW
        for part in self._branch():
            branch_BCTHW = part(branch_BCTHW)
        return F.relu_((maps_BCTHW if self.skip is None else self.skip(maps_BCTHW)) + branch_BCTHW)

    def streaming(self) -> Chain:
        skip = self.skip.streaming() if isinstance(self.skip, Unit) else None
        branch = Chain(*(part.streaming() for part in self._branch()))
        return Chain(Residual(branch, skip), PerFrame(nn.ReLU(inplace=True)))

    def _branch(self) -> list[Streamable]:
        parts = (self.a, self.b, self.middle, self.c)
        return [part for part in parts if part is not None]  # type: ignore[misc]


def relu() -> nn.Module:
    return nn.ReLU(inplace=True)


def stem(out_channels: int, num_taps: int, *, is_causal: bool) -> InARow:
    """7 x 7 convolution over ``num_taps`` frames, then a maximum over 3 x 3, both with stride 2 in space."""
    window = Sliding((num_taps, 7, 7), (1, 2, 2), is_causal)
    unit = Unit(3, out_channels, window, activation=relu())
    return InARow(unit, MaxPool(Sliding((1, 3, 3), (1, 2, 2), is_causal)))


def stage(in_channels: int, out_channels: int, taps: Sequence[int], *, stride_px: int, is_causal: bool) -> InARow:
    """One bottleneck block per entry of ``taps``: how many frames its first convolution sees.

    The first block has the stride in space, in its 3 x 3 convolution.
    """
    blocks = []
    for n, num_taps in enumerate(taps):
        step = stride_px if n == 0 else 1
        blocks.append(_bottleneck(in_channels if n == 0 else out_channels, out_channels, num_taps, step, is_causal))
    return InARow(*blocks)


def _bottleneck(in_channels: int, out_channels: int, num_taps: int, stride_px: int, is_causal: bool) -> Bottleneck:
    inner = out_channels // 4
    point = Sliding((1, 1, 1), is_causal=is_causal)
    strided = (1, stride_px, stride_px)
    is_projected = in_channels != out_channels or stride_px != 1
    return Bottleneck(
        Unit(in_channels, inner, replace(point, kernel=(num_taps, 1, 1)), activation=relu()),
        Unit(inner, inner, Sliding((1, 3, 3), strided, is_causal), activation=relu()),
        Unit(inner, out_channels, point),
        skip=Unit(in_channels, out_channels, replace(point, stride=strided)) if is_projected else None,
    )


def linear(num_features: int, num_classes: int) -> nn.Linear:
    """The classifier: weights of standard deviation 0.01, no bias at the start."""
    layer = nn.Linear(num_features, num_classes)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


class FrameHead(nn.Module):
    """Logits of one step in time: mean over space, dropout, ``classifier``."""

    def __init__(self, dropout: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.dropout, self.classifier = dropout, classifier

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        return self.classifier(self.dropout(maps_BCHW.mean((2, 3))))
