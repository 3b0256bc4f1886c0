"""Pooling over time on streams: maximum, average, the mean of all so far, the newest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sidestream.nn.steppable import Steppable
from sidestream.nn.window import Window, Windowed, triple

Size = int | tuple[int, int, int]
"""One number, or three for time, height and width."""


class _Pool(Windowed):
    """What the two poolings share: where the window of time and space lies."""

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None,
        padding: Size,
        *,
        is_causal: bool,
        time_padding: tuple[int, int] | None,
        blank_value: float,
    ) -> None:
        self_kernel = triple(kernel_size, "kernel_size")
        self_stride = self_kernel if stride is None else triple(stride, "stride")
        pads = triple(padding, "padding")
        left, right = time_padding or (pads[0], pads[0])
        causal = Window.causal(self_kernel[0], self_stride[0])
        window = causal if is_causal else Window(self_kernel[0], self_stride[0], 1, left, right)
        super().__init__(window, blank_value=blank_value)
        self.kernel_size, self.stride, self.space_padding = self_kernel, self_stride, (0, *pads[1:])

    def extra_repr(self) -> str:
        return f"{self.kernel_size}, stride={self.stride}, {self.window}"


class MaxPool3d(_Pool):
    """Maximum over windows of time and space, as torch.nn.MaxPool3d, on (B, T, C, H, W); padding never wins.

    ``is_causal``: windows end at the frame they belong to (temporal padding is all before the stream), no delay.
    Otherwise temporal padding is ``time_padding`` = (frames before, frames after), or ``padding`` on both ends, and
    the look-ahead is the delay. ``stride`` None: that of the kernel.
    """

    def __init__(
        self,
        kernel_size: Size,
        *,
        stride: Size | None = None,
        padding: Size = 0,
        is_causal: bool = False,
        time_padding: tuple[int, int] | None = None,
    ) -> None:
        blank_value = float("-inf")
        super().__init__(
            kernel_size, stride, padding, is_causal=is_causal, time_padding=time_padding, blank_value=blank_value
        )

    def slide(self, padded_BCTHW: Tensor) -> Tensor:
        return F.max_pool3d(padded_BCTHW, self.kernel_size, self.stride, self.space_padding)


class AvgPool3d(_Pool):
    """Mean over windows of time and space, as torch.nn.AvgPool3d, on (B, T, C, H, W); padding counts as zeros.

    Options as in ``MaxPool3d``.
    """

    def __init__(
        self,
        kernel_size: Size,
        *,
        stride: Size | None = None,
        padding: Size = 0,
        is_causal: bool = False,
        time_padding: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(kernel_size, stride, padding, is_causal=is_causal, time_padding=time_padding, blank_value=0.0)

    def slide(self, padded_BCTHW: Tensor) -> Tensor:
        return F.avg_pool3d(padded_BCTHW, self.kernel_size, self.stride, self.space_padding)


class RunningMean(Steppable):
    """The mean of all frames so far. State: (the mean, their number as a float64 scalar)."""

    def init_state(self, frame_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(frame_BCHW), torch.zeros((), dtype=torch.float64, device=frame_BCHW.device)

    def step(self, frame_BCHW: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mean_BCHW, num_frames = state[0], state[1] + 1
        mean_BCHW = mean_BCHW + (frame_BCHW - mean_BCHW) / num_frames.to(frame_BCHW.dtype)
        return mean_BCHW.clone(), (mean_BCHW, num_frames)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        num_frames = torch.arange(1, clip_BTCHW.shape[1] + 1, dtype=clip_BTCHW.dtype, device=clip_BTCHW.device)
        return clip_BTCHW.cumsum(1) / num_frames.reshape(1, -1, *(1,) * (clip_BTCHW.ndim - 2))


class Newest(Windowed):
    """The newest frame, every ``stride`` ticks; the frames between are swallowed."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__(Window(1, stride))

    def slide(self, padded_BCTHW: Tensor) -> Tensor:
        return padded_BCTHW[:, :, :: self.window.stride]
