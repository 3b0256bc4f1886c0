"""``LayeredDense``: layers in a row that answer each frame with maps, each a stage of depth-parallel training."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from sidestream.models.clip_layout import as_stream_of, check_clip
from sidestream.models.depth_net import FrameCheck
from sidestream.nn.combine import Chain, PerFrame


class LayeredDense(nn.Module):
    """``clip_BTCHW`` -> maps of every frame, (B, T, C', H', W'). Any number of frames from one on.

    ``multiple_px``: of what the height and width of frames must be multiples. Raises ``LayoutError`` for others, on a
    stream too.
    """

    def __init__(self, layers: OrderedDict[str, nn.Module], *, multiple_px: int) -> None:
        super().__init__()
        self.net = nn.Sequential(OrderedDict(check=FrameCheck(multiple_px, is_dense=True), **layers))
        self.multiple_px = multiple_px
        _initialise(self.net)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        check_clip("the net", clip_BTCHW)
        return PerFrame(self.net)(clip_BTCHW)

    answers = forward

    def streaming(self) -> Chain:
        """The model on a stream, its parameters shared: maps (B, C', H', W') of every frame, at once."""
        return as_stream_of(self, Chain(PerFrame(self.net)))

    def depth_modules(self) -> list[nn.Module]:
        """One module per layer, which in a row are the net on a frame: the stages of depth-parallel training."""
        _, *layers = self.net
        return layers


def conv(before: int, after: int, *, kernel_px: int = 3, stride_px: int = 1, batch_norm: bool = False) -> nn.Sequential:
    """Convolution, batch norm if wanted, ReLU."""
    layer = nn.Conv2d(before, after, kernel_px, stride_px, kernel_px // 2, bias=not batch_norm)
    return nn.Sequential(layer, *([nn.BatchNorm2d(after)] if batch_norm else []), nn.ReLU())


def doubled(layer: nn.Sequential) -> nn.Sequential:
    """``layer`` on maps of twice the size (each cell repeated; Odena et al., "Deconvolution and Checkerboard
    Artifacts", Distill 2016, on why not by a transposed convolution)."""
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), *layer)


def _initialise(net: nn.Sequential) -> None:
    """He et al.'s normal distribution for layers before a ReLU, the plain one by width for the last; biases zero."""
    layers = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if layer is layers[-1] else "relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
