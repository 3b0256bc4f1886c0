"""VGG-8 and a small CNN: image nets whose layers are stages, on every frame; made to be trained by depth.

The papers on Sideways (Malinowski et al., CVPR 2020 and 2021) train a "simple CNN" and a "VGG-8", of which the layers
are not known to us. These are our own: VGG-8 has eight layers with weights, each one a stage (Simonyan and Zisserman's
3 x 3 convolutions, ICLR 2015, with a max-pool behind each of the five, then three linear layers); the small CNN has
five, with one width and one size of map throughout, so that skips can be added without a projection.

    vgg8         conv 64, 128, 256, 512, 512, each / 2      mean over the map      linear 512, 512, classes
    simple_cnn   conv 5 x 5 / 4 and three convs of 64       mean over the map      linear classes

Names that end in ``_tsm_online`` have the uni-directional temporal shift (Lin, Gan and Han, ICCV 2019) before every
convolution but the first, so their layers see earlier frames: what Skip-Sideways is compared with.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from sidestream.errors import LayoutError, ModelError, WeightsError
from sidestream.models.clip_layout import as_stream_of, check_clip
from sidestream.models.info import ModelInfo
from sidestream.models.weights import KeyMap
from sidestream.nn.combine import Chain, PerFrame
from sidestream.nn.shift import OnlineShift
from sidestream.types import InputSpec

NUM_CLASSES = 101
NUM_FRAMES = 16
SIZE_PX = 112
MIN_SIZE_PX = 32
VGG8_WIDTHS = (64, 128, 256, 512, 512)
HIDDEN = 512
SIMPLE_WIDTH = 64
PLAIN: dict[str, tuple[float, bool]] = {
    "vgg8": (1.0, False),
    "vgg8_bn": (1.0, True),
    "vgg8_quarter": (0.25, False),
    "vgg8_quarter_bn": (0.25, True),
    "simple_cnn": (1.0, False),
    "simple_cnn_bn": (1.0, True),
}
"""Name -> width factor, whether it has batch norms."""
SHIFTED = "_tsm_online"
WITH_SHIFT = ("vgg8", "vgg8_quarter", "simple_cnn")


def names() -> list[str]:
    return [*PLAIN, *(name + SHIFTED for name in WITH_SHIFT)]


def info(name: str) -> ModelInfo:
    spec = InputSpec(size_px=(SIZE_PX, SIZE_PX), layout="BTCHW", num_frames=NUM_FRAMES, min_frames=1)
    return ModelInfo(name, "sidestream", "clip", spec, NUM_CLASSES)


def build(name: str, num_classes: int | None) -> nn.Module:
    make = simple_cnn if name.startswith("simple") else vgg8
    width, batch_norm = PLAIN[name.removesuffix(SHIFTED)]
    net = make(num_classes or NUM_CLASSES, width=width, batch_norm=batch_norm)
    return ShiftedNet(net) if name.endswith(SHIFTED) else net


def build_default(name: str) -> nn.Module:
    raise WeightsError(f"{name} has no default weights; give a local .safetensors or .pt file")


def key_map(name: str) -> KeyMap:
    return dict


def vgg8(
    num_classes: int = NUM_CLASSES, *, width: float = 1.0, batch_norm: bool = False, dropout: float = 0.0
) -> LayeredNet:
    """Five convolutions and three linear layers: eight stages.

    ``width``: factor on all widths. ``batch_norm``: behind each convolution. ``dropout``: before the last two layers.
    Raises ``ModelError`` for a width that leaves no channel.
    """
    widths = [_scaled(each, width) for each in VGG8_WIDTHS]
    hidden = _scaled(HIDDEN, width)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (before, after) in enumerate(zip([3, *widths], widths, strict=False), start=1):
        layers[f"conv{number}"] = _conv(before, after, batch_norm=batch_norm, pools=True)
    layers["fc6"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], hidden), nn.ReLU())
    layers["fc7"] = nn.Sequential(nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.ReLU())
    layers["fc8"] = nn.Sequential(nn.Dropout(dropout), nn.Linear(hidden, num_classes))
    return LayeredNet(layers, num_trunk=5, num_features=widths[-1], stride_px=32)


def simple_cnn(num_classes: int = NUM_CLASSES, *, width: float = 1.0, batch_norm: bool = False) -> LayeredNet:
    """Four convolutions of one width, the first with stride 4, and a linear layer: five stages."""
    wide = _scaled(SIMPLE_WIDTH, width)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = _conv(3, wide, batch_norm=batch_norm, kernel_px=5, stride_px=4)
    for number in (2, 3, 4):
        layers[f"conv{number}"] = _conv(wide, wide, batch_norm=batch_norm)
    layers["fc5"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, num_classes))
    return LayeredNet(layers, num_trunk=4, num_features=wide, stride_px=4)


class StackedNet(nn.Module):
    """Layers in a row, on each frame: ``clip_BTCHW`` -> logits (B, num_classes), the mean over the frames.

    Any number of frames from one on, any size from 32 px on. The first ``num_trunk`` layers make the maps that
    ``features`` gives. Raises ``LayoutError`` for other axes and smaller frames.
    """

    def __init__(self, net: nn.Sequential, *, num_trunk: int, num_features: int, stride_px: int) -> None:
        super().__init__()
        self.net = net
        self.num_trunk, self.num_features, self.stride_px = num_trunk, num_features, stride_px
        last = list(net._modules)[-1]
        self.classifier = f"net.{last}.{len(net[-1]) - 1}"  # type: ignore[arg-type]

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self.answers(clip_BTCHW).mean(1)

    def answers(self, clip_BTCHW: Tensor) -> Tensor:
        """Logits of every frame (B, T, num_classes): the clip form of ``streaming``."""
        return self._chain(len(self.net))(self._checked(clip_BTCHW))

    def streaming(self) -> Chain:
        """The model on a stream, its parameters shared: logits (B, num_classes) of every frame, at once."""
        return as_stream_of(self, self._chain(len(self.net)))

    def features(self, clip_BTCHW: Tensor) -> Tensor:
        """Maps of every frame before they are pooled, (B, T, num_features, H', W')."""
        return self._chain(self.num_trunk)(self._checked(clip_BTCHW))

    def streaming_features(self) -> Chain:
        """``features`` on a stream: maps (B, num_features, H', W') of every frame, at once."""
        return as_stream_of(self, self._chain(self.num_trunk))

    def _chain(self, num_layers: int) -> Chain:
        return Chain(PerFrame(self.net[:num_layers]))

    def _checked(self, clip_BTCHW: Tensor) -> Tensor:
        check_clip("the net", clip_BTCHW)
        if min(clip_BTCHW.shape[-2:]) < MIN_SIZE_PX:
            height, width = clip_BTCHW.shape[-2:]
            raise LayoutError(f"the net was given frames of {height} x {width} px; it needs {MIN_SIZE_PX} px or more")
        return clip_BTCHW


class LayeredNet(StackedNet):
    """A net whose layers work on single frames, each of them a stage."""

    def __init__(
        self, layers: OrderedDict[str, nn.Module], *, num_trunk: int, num_features: int, stride_px: int
    ) -> None:
        super().__init__(nn.Sequential(layers), num_trunk=num_trunk, num_features=num_features, stride_px=stride_px)
        _initialise(self)

    def depth_modules(self) -> list[nn.Module]:
        """One module per layer, which in a row are the net on a frame: the stages of depth-parallel training."""
        return list(self.net)


class ShiftedNet(StackedNet):
    """The layers of ``net`` with ``OnlineShift`` before each layer of the trunk but the first."""

    def __init__(self, net: LayeredNet, *, share: float = 0.125) -> None:
        super().__init__(net.net, num_trunk=net.num_trunk, num_features=net.num_features, stride_px=net.stride_px)
        self.share = share

    def _chain(self, num_layers: int) -> Chain:
        shifted = [
            each for layer in self.net[1 : self.num_trunk] for each in (OnlineShift(self.share), PerFrame(layer))
        ]
        head = [PerFrame(layer) for layer in self.net[self.num_trunk : num_layers]]
        return Chain(PerFrame(self.net[0]), *shifted, *head)


def _conv(
    before: int, after: int, *, batch_norm: bool, pools: bool = False, kernel_px: int = 3, stride_px: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(before, after, kernel_px, stride_px, kernel_px // 2, bias=not batch_norm)
    layers: list[nn.Module] = [conv, *([nn.BatchNorm2d(after)] if batch_norm else []), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pools else []))


def _scaled(width: int, factor: float) -> int:
    if round(width * factor) < 1:
        raise ModelError(f"a width factor of {factor} leaves {width} x {factor} channels; give a larger one")
    return round(width * factor)


def _initialise(net: LayeredNet) -> None:
    """He et al.'s normal distribution for layers before a ReLU, a narrow one for the classifier; biases zero."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(net.get_submodule(net.classifier).weight, std=0.01)  # type: ignore[arg-type]
