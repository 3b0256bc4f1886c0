"""par-DenseNet: a DenseNet whose stages run side by side, each on another frame; on every frame, classes or heat maps.

Huang et al., "Densely Connected Convolutional Networks" (CVPR 2017), in stages for Massively Parallel Video Networks
(Carreira, Patraucean et al., ECCV 2018). A stage is a few dense layers (norm, ReLU, 1 x 1 convolution, norm,
ReLU, 3 x 3 convolution, their output joined to their input); it reads the outputs of all earlier stages of its dense
block. In parallel wiring these dense connections are the skips that bring newer frames:

    frame -> stage 1 (stem) -> 2 -> 3   |  4 (transition) -> 5 -> 6 -> 7  |  8 (transition) ...  -> K (norm, head)
             each reads all of its block   the first reads all of the block before

par_densenet: blocks of 3, 4, 4 and 3 stages of two dense layers (four convolutions), growth 32. That an image DenseNet
was converted, and that as little as four convolutions run per frame and time step, is in the paper's abstract and talk;
the numbers of blocks and channels there are not known to us. Differs from image DenseNets: only the first transition
halves the maps (``num_pools``), so that they end at 1/8, for heat maps. With ``num_pools=3`` it is torchvision's
DenseNet on each frame.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestream.errors import ModelError, WeightsError
from sidestream.models.depth_net import Block, DepthNet, answer_as_maps, zero_conv
from sidestream.models.info import ModelInfo
from sidestream.models.weights import KeyMap, StateDict
from sidestream.types import InputSpec

NUM_CLASSES = 101
NUM_LAYERS = 2
"""Dense layers of a stage."""
CONFIGS: dict[str, tuple[tuple[int, ...], int, int, int, int, int]] = {
    "par_densenet": ((3, 4, 4, 3), 32, 64, 4, 128, 224),
    "par_densenet_tiny": ((2, 3, 3), 8, 16, 4, 32, 64),
}
"""Name -> stages of each dense block, growth, channels of the stem, bottleneck, channels of a dense head, pixels."""
NUM_FRAMES = 32


def names() -> list[str]:
    return list(CONFIGS)


def info(name: str) -> ModelInfo:
    size = CONFIGS[name][5]
    spec = InputSpec(size_px=(size, size), layout="BTCHW", num_frames=NUM_FRAMES, min_frames=1)
    return ModelInfo(name, "sidestream", "clip", spec, NUM_CLASSES)


def build(name: str, num_classes: int | None) -> nn.Module:
    stages, growth, stem, bottleneck, num_inner, _ = CONFIGS[name]
    net = ParDenseNet(num_classes or NUM_CLASSES, stages=stages, growth=growth, stem=stem, bottleneck=bottleneck)
    net.num_inner = num_inner
    return net


def build_default(name: str) -> nn.Module:
    raise WeightsError(f"{name} has no default weights; give a local .safetensors or .pt file")


def key_map(name: str) -> KeyMap:
    return densenet_keys(CONFIGS[name][0])


class ParDenseNet(DepthNet):
    """See the top of the file. ``stages``: of each dense block; ``num_layers``: dense layers of a stage.

    ``bottleneck``: channels of the 1 x 1 convolutions, in growths. ``num_pools``: transitions that halve the maps, the
    first ones. Raises ``ModelError`` for widths that leave nothing.
    """

    classifier = "head.2"

    def __init__(
        self,
        num_classes: int = NUM_CLASSES,
        *,
        stages: Sequence[int] = (3, 4, 4, 3),
        growth: int = 32,
        stem: int = 64,
        bottleneck: int = 4,
        num_layers: int = NUM_LAYERS,
        num_pools: int = 1,
    ) -> None:
        super().__init__(num_classes)
        if min(*stages, growth, stem, bottleneck, num_layers) < 1 or sum(stages) < 2:
            raise ModelError(f"{stages=}, {growth=}, {stem=}, {bottleneck=}, {num_layers=}; give 1 or more of each")
        self.stages_per_block = tuple(stages)
        made: list[DenseStage] = []
        num_channels = 3
        for number, count in enumerate(stages):
            opening: nn.Module = Stem(stem) if number == 0 else Transition(num_channels, pools=number <= num_pools)
            num_channels = stem if number == 0 else num_channels // 2
            for n in range(count):
                first = opening if n == 0 else None
                is_last = number == len(stages) - 1 and n == count - 1
                made.append(DenseStage(num_channels, growth, bottleneck, num_layers, opening=first, is_last=is_last))
                num_channels += num_layers * growth
        self.stages = nn.ModuleList(made)
        self.num_features = num_channels
        self.stride_px = 4 * 2 ** min(num_pools, len(stages) - 1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(num_channels, num_classes))
        _initialise(self)

    def trunk_blocks(self) -> list[Block]:
        blocks: list[Block] = []
        before: tuple[int, ...] = (0,)
        for number, count in enumerate(self.stages_per_block, start=1):
            first = len(blocks) + 1
            for n in range(first, first + count):
                reads = before if n == first else tuple(range(first, n))
                blocks.append(Block(f"dense{number}.{n - first + 1}", self.stages[n - 1], reads))
            before = tuple(range(first, first + count))
        return blocks

    def class_head(self) -> nn.Module:
        return self.head

    def remove_class_head(self) -> None:
        self.head = nn.Sequential()

    @property
    def fed_module(self) -> DenseStage:
        return self.stages[self.feedback_into - 1]  # type: ignore[return-value]

    def make_feedback(self, num_channels: int) -> None:
        self.fed_module.make_feedback(num_channels)


class DenseStage(nn.Module):
    """Dense layers behind an opening, where there is one: maps of the stages that it reads -> its new maps.

    The first stage of a block also gives what the opening made; the last of the net all maps, normed.
    """

    def __init__(
        self,
        num_channels: int,
        growth: int,
        bottleneck: int,
        num_layers: int,
        *,
        opening: nn.Module | None = None,
        is_last: bool = False,
    ) -> None:
        super().__init__()
        self.opening = opening
        widths = [num_channels + n * growth for n in range(num_layers)]
        self.layers = nn.ModuleList([DenseLayer(width, growth, bottleneck) for width in widths])
        self.norm = nn.BatchNorm2d(widths[-1] + growth) if is_last else None
        self.feedback: nn.Conv2d | None = None

    def make_feedback(self, num_channels: int) -> None:
        conv1: nn.Conv2d = self.layers[0].conv1  # type: ignore[assignment]
        self.feedback = zero_conv(num_channels, conv1.out_channels, conv1.weight)

    def forward(self, *inputs: Tensor) -> Tensor:
        answer: Tensor | None = None
        if self.feedback is not None:
            *inputs, answer = inputs  # type: ignore[assignment]
        x = torch.cat(inputs, 1) if len(inputs) > 1 else inputs[0]
        made = [x if self.opening is None else self.opening(x)]
        for layer in self.layers:
            joined = torch.cat(made, 1) if len(made) > 1 else made[0]
            extra = None
            if len(made) == 1 and self.feedback is not None and answer is not None:
                extra = self.feedback(answer_as_maps(answer, joined))
            made.append(layer(joined, extra))
        if self.norm is not None:
            return F.relu(self.norm(torch.cat(made, 1)))
        return torch.cat(made if self.opening is not None else made[1:], 1)


class DenseLayer(nn.Module):
    """norm1, ReLU, conv1 (1 x 1), norm2, ReLU, conv2 (3 x 3): the new channels only."""

    def __init__(self, num_channels: int, growth: int, bottleneck: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(num_channels)
        self.conv1 = nn.Conv2d(num_channels, bottleneck * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck * growth)
        self.conv2 = nn.Conv2d(bottleneck * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        """``extra``: what further channels of ``conv1`` add."""
        inner = self.conv1(F.relu(self.norm1(x)))
        return self.conv2(F.relu(self.norm2(inner if extra is None else inner + extra)))


class Stem(nn.Module):
    """7 x 7 convolution / 2, norm, ReLU, maximum / 2."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, num_channels, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(num_channels)

    def forward(self, frame_BCHW: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.norm(self.conv(frame_BCHW))), 3, stride=2, padding=1)


class Transition(nn.Module):
    """Norm, ReLU, a 1 x 1 convolution to half of the channels, and the mean of 2 x 2 where it pools."""

    def __init__(self, num_channels: int, *, pools: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_channels)
        self.conv = nn.Conv2d(num_channels, num_channels // 2, 1, bias=False)
        self.pools = pools

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.relu(self.norm(x)))
        return F.avg_pool2d(x, 2) if self.pools else x


def densenet_keys(stages: Sequence[int], num_layers: int = NUM_LAYERS) -> KeyMap:
    """From torchvision's DenseNet with as many layers; other keys are given back as they are."""
    firsts = [sum(stages[:n]) for n in range(len(stages) + 1)]

    def renamed(key: str) -> str:
        if found := re.fullmatch(r"features\.(conv|norm)0\.(.+)", key):
            return f"stages.0.opening.{found[1]}.{found[2]}"
        if found := re.fullmatch(r"features\.denseblock(\d+)\.denselayer(\d+)\.(.+)", key):
            stage, layer = divmod(int(found[2]) - 1, num_layers)
            return f"stages.{firsts[int(found[1]) - 1] + stage}.layers.{layer}.{found[3]}"
        if found := re.fullmatch(r"features\.transition(\d+)\.(.+)", key):
            return f"stages.{firsts[int(found[1])]}.opening.{found[2]}"
        if found := re.fullmatch(r"features\.norm5\.(.+)", key):
            return f"stages.{firsts[-1] - 1}.norm.{found[1]}"
        return re.sub(r"^classifier\.", "head.2.", key)

    def mapped(state: StateDict) -> StateDict:
        return {renamed(key): value for key, value in state.items()}

    return mapped


def _initialise(net: ParDenseNet) -> None:
    """As torchvision's: He et al.'s normal distribution for convolutions, biases zero."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
