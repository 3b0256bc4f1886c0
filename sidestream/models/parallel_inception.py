"""par-Inception: the causal inflated Inception-v1 in ten subnetworks that run side by side; classes or maps per frame.

Massively Parallel Video Networks (Carreira, Patraucean et al., ECCV 2018) convert an Inception-v1 that was inflated
(Carreira and Zisserman, CVPR 2017) with causal convolutions; ten subnetworks are fully parallel, five groups of them
semi-parallel (numbers as we remember them; which layers are in which is our choice). The layers are those of our
``i3d_causal``, with its weights' keys, but no layer has a temporal stride, so that every frame has its answer:

    1  Conv 1a, pool 2a    3  Mixed 3b             5  Mixed 4b    7  Mixed 4d    9  Mixed 4f, pool 5a
    2  Conv 2b, 2c, pool   4  Mixed 3c, pool 4a    6  Mixed 4c    8  Mixed 4e   10  Mixed 5b, 5c, pool, logits

The causal I3D's weights fit, but see more frames in the same time here; they are to be trained further.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestream.errors import ModelError, WeightsError
from sidestream.models.clip_layout import ClipForm
from sidestream.models.depth_net import Block, DepthNet, answer_as_maps, zero_conv
from sidestream.models.i3d import TRUNK
from sidestream.models.i3d_layers import Logits, NormedFrames, Sliding, TrunkLayer, Unit, trunk_layer
from sidestream.models.info import ModelInfo
from sidestream.models.weights import KeyMap
from sidestream.nn.combine import Chain
from sidestream.nn.steppable import Steppable
from sidestream.types import InputSpec

NUM_CLASSES = 101
NUM_FRAMES = 32
CONFIGS = {"par_inception": (1.0, 256, 224), "par_inception_quarter": (0.25, 64, 112)}
"""Name -> width factor, channels inside of a dense head, pixels."""
SUBNETWORKS = (2, 3, 1, 2, 1, 1, 1, 1, 2, 2)
"""Layers of ``TRUNK`` in each."""


def names() -> list[str]:
    return list(CONFIGS)


def info(name: str) -> ModelInfo:
    size = CONFIGS[name][2]
    half = (0.5, 0.5, 0.5)
    spec = InputSpec((size, size), mean=half, std=half, layout="BTCHW", num_frames=NUM_FRAMES, min_frames=1)
    return ModelInfo(name, "sidestream", "clip", spec, NUM_CLASSES)


def build(name: str, num_classes: int | None) -> nn.Module:
    width, num_inner, _ = CONFIGS[name]
    net = ParInception(num_classes or NUM_CLASSES, width=width)
    net.num_inner = num_inner
    return net


def build_default(name: str) -> nn.Module:
    raise WeightsError(f"{name} has no default weights; give a local .safetensors or .pt file")


def key_map(name: str) -> KeyMap:
    return dict


class ParInception(DepthNet):
    """See the top of the file. ``width``: factor on all channels."""

    classifier = "logits"
    stride_px = 32

    def __init__(self, num_classes: int = NUM_CLASSES, *, width: float = 1.0) -> None:
        super().__init__(num_classes)
        if not width > 0:
            raise ModelError(f"{width = }; give a factor above 0")
        num_channels = 3
        for name, channels, kernel, (_, *stride_px) in TRUNK:
            window = Sliding(kernel, (1, stride_px[0], stride_px[1]), is_causal=True)
            layer, num_channels = trunk_layer(num_channels, tuple(max(1, round(c * width)) for c in channels), window)
            self.add_module(name, layer)
        self.num_features = num_channels
        self.logits: nn.Module = Logits(num_channels, num_classes, is_causal=True)
        self.feedback: nn.Conv2d | None = None
        self._form = ClipForm(self, self._chains)

    def trunk_blocks(self) -> list[Block]:
        names, start, blocks = [name for name, *_ in TRUNK], 0, []
        chains = self._form()
        for number, count in enumerate(SUBNETWORKS, start=1):
            name = "-".join(each.partition("_")[2] for each in names[start : start + count])
            blocks.append(Block(name, chains[number - 1], (number - 1,)))
            start += count
        return blocks

    def class_head(self) -> nn.Module:
        return self._form()[-1]

    def remove_class_head(self) -> None:
        self.logits = nn.Identity()

    @property
    def fed_module(self) -> nn.Module:
        return self

    def make_feedback(self, num_channels: int) -> None:
        weight: Tensor = self.get_submodule("Conv3d_2b_1x1").conv3d.weight  # type: ignore[assignment,union-attr]
        self.feedback = zero_conv(num_channels, weight.shape[0], weight)

    def _layers(self) -> Iterator[tuple[str, TrunkLayer]]:
        return ((name, self.get_submodule(name)) for name, *_ in TRUNK)  # type: ignore[misc]

    def _chains(self) -> tuple[Chain, ...]:
        """The subnetworks on streams, their parameters shared, and the last layer where it gives classes."""
        layers, chains = list(self._layers()), []
        for count in SUBNETWORKS:
            own, layers = layers[:count], layers[count:]
            parts: list[Steppable] = []
            for name, layer in own:
                if name == "Conv3d_2b_1x1" and self.feedback is not None:
                    parts.append(FedUnit(layer, self.feedback))  # type: ignore[arg-type]
                else:
                    made = layer.streaming()
                    parts += made.layers if isinstance(made, Chain) else (made,)
            chains.append(Chain(*parts))
        if isinstance(self.logits, Logits):
            chains.append(self.logits.streaming())
        return tuple(chains)


class FedUnit(Steppable):
    """A 1 x 1 x 1 unit on maps and the last answer, which are joined along the channels. No memory."""

    def __init__(self, unit: Unit, feedback: nn.Conv2d) -> None:
        super().__init__()
        self.conv3d, self.feedback, self.after = unit.conv3d, feedback, NormedFrames(unit.bn)

    def init_state(self, frame_BCHW: tuple[Tensor, Tensor]) -> None:  # type: ignore[override]
        return None

    def step(self, frame_BCHW: tuple[Tensor, Tensor], state: None) -> tuple[Tensor, None]:  # type: ignore[override]
        x, answer = frame_BCHW
        inner = F.conv2d(x, self.conv3d.weight[:, :, 0]) + self.feedback(answer_as_maps(answer, x))
        return self.after(inner), None

    def forward(self, clip_BTCHW: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        pairs = zip(*(x.unbind(1) for x in clip_BTCHW), strict=True)
        return torch.stack([self.step(pair, None)[0] for pair in pairs], 1)
