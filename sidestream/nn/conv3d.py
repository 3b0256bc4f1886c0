"""3D convolutions on streams: causal ones, and non-causal ones run exactly, their look-ahead a declared delay."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sidestream.errors import ModelError
from sidestream.nn.window import Window, Windowed, triple

Size = int | tuple[int, int, int]
"""One number, or three for time, height and width."""
_FEW_CHANNELS, _MANY_FOLDED = 4, 16
"""Images with so many taps: there the 3D convolution is the faster one (7x7x7 over RGB: 0.65 of the 2D one's time)."""


class _Convolution(Windowed):
    """Slides a torch.nn.Conv3d's weights over time; ``weight`` and ``bias`` are named and shaped as there."""

    def __init__(self, conv: nn.Conv3d, window: Window) -> None:
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ModelError(
                f"padding={conv.padding!r} with padding_mode={conv.padding_mode!r} has no streaming form here; "
                "give the padding as zeros, in numbers"
            )
        if hasattr(conv, "feedback_weight"):
            raise ModelError("a convolution with random feedback has no sliding form; it would go back over its own")
        super().__init__(window)
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.space_padding = (0, *conv.padding[1:])

    def slide(self, padded_BCTHW: Tensor) -> Tensor:
        channels, taps = self.weight.shape[1:3]
        is_faster_in_3d = channels <= _FEW_CHANNELS and channels * taps > _MANY_FOLDED
        if padded_BCTHW.shape[2] == self.window.span + 1 and not is_faster_in_3d:
            return self._one_window(padded_BCTHW)
        padding, dilation = self.space_padding, self.dilation
        return F.conv3d(padded_BCTHW, self.weight, self.bias, self.stride, padding, dilation, self.groups)

    def _one_window(self, window_BCTHW: Tensor) -> Tensor:
        """One answer, as a 2D convolution whose input channels are those of all taps: (C, taps) -> C * taps.

        The same products, and no axis of length one for the convolution to walk along. Weights lie in memory in that
        order already, so nothing is copied for it.
        """
        taps_BCHW = window_BCTHW[:, :, :: self.dilation[0]].flatten(1, 2)
        (_, *stride), (_, *padding), (_, *dilation) = self.stride, self.space_padding, self.dilation
        weight = self.weight.flatten(1, 2)
        return F.conv2d(taps_BCHW, weight, self.bias, stride, padding, dilation, self.groups).unsqueeze(2)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {self.window}"


class Conv3d(_Convolution):
    """torch.nn.Conv3d on (B, T, C, H, W), and frame by frame with a delay of the frames it looks ahead.

    ``padding`` adds zeros on both ends of time and space, as in torch; ``time_padding`` = (frames before, frames
    after) replaces the temporal part where the ends differ. The clip form takes the zeros after the last frame from
    the clip's end; the step form takes them in ``finish``. The answers of the steps are those of the interior.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        *,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        time_padding: tuple[int, int] | None = None,
    ) -> None:
        kernel, strides, pads = triple(kernel_size, "kernel_size"), triple(stride, "stride"), triple(padding, "padding")
        conv = nn.Conv3d(in_channels, out_channels, kernel, strides, pads, triple(dilation, "dilation"), groups, bias)
        super().__init__(conv, _window(conv, time_padding))

    @classmethod
    def from_torch(cls, conv: nn.Conv3d, *, time_padding: tuple[int, int] | None = None) -> Conv3d:
        """The same convolution on streams; its parameters are shared with ``conv``, not copied."""
        layer = cls.__new__(cls)
        _Convolution.__init__(layer, conv, _window(conv, time_padding))
        return layer


class CausalConv3d(_Convolution):
    """A 3D convolution that sees no later frame: all temporal padding lies before the stream. No delay.

    ``padding`` is that of space, (height, width) or one number. With a temporal stride s, it answers frames 0, s, 2s,
    ... and swallows the others.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        *,
        stride: Size = 1,
        padding: int | tuple[int, int] = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        kernel, strides = triple(kernel_size, "kernel_size"), triple(stride, "stride")
        pads = (0, padding, padding) if isinstance(padding, int) else (0, *padding)
        conv = nn.Conv3d(in_channels, out_channels, kernel, strides, pads, triple(dilation, "dilation"), groups, bias)
        super().__init__(conv, _causal_window(conv))

    @classmethod
    def from_torch(cls, conv: nn.Conv3d) -> CausalConv3d:
        """The causal ("masked") variant of ``conv``, with its parameters shared; its temporal padding is dropped."""
        layer = cls.__new__(cls)
        _Convolution.__init__(layer, conv, _causal_window(conv))
        return layer


def _window(conv: nn.Conv3d, time_padding: tuple[int, int] | None) -> Window:
    if isinstance(conv.padding, str):
        left, right = 0, 0  # refused by _Convolution
    else:
        left, right = time_padding or (conv.padding[0], conv.padding[0])
    return Window(conv.kernel_size[0], conv.stride[0], conv.dilation[0], left, right)


def _causal_window(conv: nn.Conv3d) -> Window:
    return Window.causal(conv.kernel_size[0], conv.stride[0], conv.dilation[0])
