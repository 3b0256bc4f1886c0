"""TSM: torchvision's ResNet-50 and MobileNetV2 with a temporal shift in every residual branch.

Lin, Gan, Han, "TSM: Temporal Shift Module for Efficient Video Understanding" (ICCV 2019): section 4.1 (offline, both
ways) and 4.2 (online, from the past only). The shift stands inside the residual branch, before its first convolution;
in MobileNetV2 in the blocks that have a skip path, as in the authors' code (``ops/temporal_shift.py``). It has no
parameters, so weights of the image model load strictly, and so do the authors' files for ResNets.

Differs from the paper: no dropout before the last layer of ResNet-50.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from sidestream.errors import ModelError, WeightsError
from sidestream.models.clip_layout import ClipForm, as_stream_of, check_clip
from sidestream.models.info import ModelInfo
from sidestream.models.weights import KeyMap, StateDict
from sidestream.nn.combine import Chain, PerFrame, Residual
from sidestream.nn.shift import OnlineShift, TemporalShift
from sidestream.nn.steppable import Steppable
from sidestream.types import InputSpec

if TYPE_CHECKING:
    from torchvision.models import MobileNetV2, ResNet

NUM_DIV = 8
"""One channel in so many is shifted, in each direction."""
NAMES = {
    "tsm_resnet50": ("resnet50", False),
    "tsm_resnet50_online": ("resnet50", True),
    "tsm_mobilenet_v2": ("mobilenet_v2", False),
    "tsm_mobilenet_v2_online": ("mobilenet_v2", True),
}
"""Name -> torchvision's image model, whether it shifts from the past only."""
NUM_SHIFTS = {"resnet50": 16, "mobilenet_v2": 10}
_AUTHORS_KEYS = ((r"^base_model\.", ""), (r"\.conv1\.net\.", ".conv1."), (r"^new_fc\.", "fc."))


def names() -> list[str]:
    return list(NAMES)


def info(name: str) -> ModelInfo:
    image_model, is_online = NAMES[name]
    spec = InputSpec(
        resize_px=256,
        layout="BTCHW",
        num_frames=8,
        min_frames=1,
        frame_step=8,
        causal=is_online,
        delay_ticks=0 if is_online else NUM_SHIFTS[image_model],
    )
    return ModelInfo(name, "sidestream", "clip", spec, 400)


def build(name: str, num_classes: int | None) -> nn.Module:
    from torchvision.models import get_model

    image_model, is_online = NAMES[name]
    return TSM(get_model(image_model, weights=None, num_classes=num_classes or 400), is_online=is_online)


def build_default(name: str) -> nn.Module:
    raise WeightsError(f"{name} has no default weights; give a local .safetensors or .pt file")


def key_map(name: str) -> KeyMap:
    return map_keys


def map_keys(state: StateDict) -> StateDict:
    """The keys of the authors' ResNet files as torchvision's; torchvision's own are given back unchanged."""
    return {_renamed(key): value for key, value in state.items()}


class TSM(nn.Module):
    """Shifted image model: ``clip_BTCHW`` -> logits (B, num_classes), the mean over the frames' logits.

    ``net``: a ResNet or MobileNetV2 of torchvision; its parameters keep their names. Any number of frames from one on
    (trained on 8), any size that ``net`` takes. ``is_online``: shift from the past only, so no answer sees a later
    frame; otherwise each shift sees one frame ahead.

    Raises ``LayoutError`` for other axes, ``ModelError`` for another kind of net.
    """

    stride_px = 32

    def __init__(self, net: nn.Module, *, is_online: bool = False) -> None:
        super().__init__()
        self.net, self.is_online = net, is_online
        self.classifier = "net.fc" if hasattr(net, "fc") else "net.classifier"
        self.num_features = next(m for m in reversed(list(net.modules())) if isinstance(m, nn.Linear)).in_features
        self._clip_form = ClipForm(net, self._chains)

    @property
    def weights_target(self) -> nn.Module:
        """The net whose keys a weights file has."""
        return self.net

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self.answers(clip_BTCHW).mean(1)

    def answers(self, clip_BTCHW: Tensor) -> Tensor:
        """Logits of every frame (B, T, num_classes): the clip form of ``streaming``."""
        check_clip("TSM", clip_BTCHW)
        return self._clip_form()[0](clip_BTCHW)

    def features(self, clip_BTCHW: Tensor) -> Tensor:
        """Maps of every frame before the last pooling, (B, T, num_features, H / 32, W / 32)."""
        check_clip("TSM", clip_BTCHW)
        for layer in self._clip_form()[0].layers[:-1]:
            clip_BTCHW = layer(clip_BTCHW)
        return clip_BTCHW

    def streaming_features(self) -> Chain:
        """``features`` on a stream: maps (B, num_features, H / 32, W / 32), as late as ``streaming``."""
        return as_stream_of(self, Chain(*self._chain().layers[:-1]))

    def streaming(self) -> Chain:
        """The net on a stream, its parameters shared: logits (B, num_classes) of every frame.

        They come at once where ``is_online``, otherwise one tick late for each shift. Use it in eval mode: batch norms
        work frame by frame.
        """
        return as_stream_of(self, self._chain())

    def _chains(self) -> tuple[Chain]:
        return (self._chain(),)

    def _chain(self) -> Chain:
        shift: Callable[[], Steppable] = (
            (lambda: OnlineShift(1 / NUM_DIV)) if self.is_online else (lambda: TemporalShift(NUM_DIV))
        )
        return Chain(*_layers(self.net, shift))


def _layers(net: nn.Module, shift: Callable[[], Steppable]) -> Iterator[Steppable]:
    from torchvision.models import MobileNetV2, ResNet

    if isinstance(net, ResNet):
        return _resnet_layers(net, shift)
    if isinstance(net, MobileNetV2):
        return _mobilenet_layers(net, shift)
    raise ModelError(f"TSM has no place for shifts in a {type(net).__name__}; give torchvision's ResNet or MobileNetV2")


def _resnet_layers(net: ResNet, shift: Callable[[], Steppable]) -> Iterator[Steppable]:
    yield PerFrame(nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool))
    for group in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in group:
            skip = None if block.downsample is None else PerFrame(block.downsample)
            yield Residual(Chain(shift(), PerFrame(nn.Sequential(*_branch(block)))), skip)
            yield PerFrame(block.relu)
    yield PerFrame(nn.Sequential(net.avgpool, nn.Flatten(), net.fc))


def _branch(block: nn.Module) -> Iterator[nn.Module]:
    """The residual branch of torchvision's BasicBlock or Bottleneck: an activation between, none at the end."""
    last = 3 if hasattr(block, "conv3") else 2
    for n in range(1, last + 1):
        yield block.get_submodule(f"conv{n}")
        yield block.get_submodule(f"bn{n}")
        if n < last:
            yield block.get_submodule("relu")


def _mobilenet_layers(net: MobileNetV2, shift: Callable[[], Steppable]) -> Iterator[Steppable]:
    for block in net.features:
        is_shifted = getattr(block, "use_res_connect", False)
        yield Residual(Chain(shift(), PerFrame(block.conv))) if is_shifted else PerFrame(block)
    yield PerFrame(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.classifier))


def _renamed(key: str) -> str:
    for pattern, replacement in _AUTHORS_KEYS:
        key = re.sub(pattern, replacement, key)
    return key
