"""TSN, temporal segment networks: one frame from each part of a clip, an image model on each, and a consensus.

Wang et al., "Temporal Segment Networks: Towards Good Practices for Deep Action Recognition" (ECCV 2016), section 3.1,
equation 1; RGB only. Segment i of N in a clip of T frames covers the frames [i T / N, (i + 1) T / N); the frame taken
lies at its middle, or in training at a random point of it:

    frame(i) = floor((i + r) T / N), r = 1/2 or uniform in [0, 1)

    T = 9, N = 3    . x . | . x . | . x .

Differs from the paper: 8 segments by default (there 3 in training and 25 frames at test time), and a ResNet-50.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sidestream.errors import ModelError, WeightsError
from sidestream.models import tsm
from sidestream.models.frame import FrameMaps, check_frames, maps_of
from sidestream.models.info import ModelInfo, info_of
from sidestream.models.weights import KeyMap
from sidestream.nn.combine import PerFrame
from sidestream.types import InputSpec

Consensus = Literal["mean", "max"]
NUM_SEGMENTS = 8
NAMES = {"tsn_resnet50": "torchvision/resnet50"}


def names() -> list[str]:
    return list(NAMES)


def info(name: str) -> ModelInfo:
    spec = InputSpec(resize_px=256, layout="BTCHW", num_frames=64, min_frames=NUM_SEGMENTS, causal=False)
    return ModelInfo(name, "sidestream", "clip", spec, 400)


def build(name: str, num_classes: int | None) -> nn.Module:
    return TSN(num_classes or 400, backbone=NAMES[name])


def build_default(name: str) -> nn.Module:
    raise WeightsError(f"{name} has no default weights; give a local .safetensors or .pt file")


def key_map(name: str) -> KeyMap:
    return tsm.map_keys  # the authors of TSM publish their TSN with the same keys


class TSN(nn.Module):
    """Image model on one frame per segment: ``clip_BTCHW`` -> logits (B, num_classes).

    ``backbone``: an image model by name (``"resnet18"``, ``"timm/vit_tiny_patch16_224"``), with random weights and
    ``num_classes`` classes, or a module of your own: frame_BCHW -> logits (its own number of classes counts).
    ``consensus``: "mean" or "max" of the segments' logits. ``generator``: of the random frames in training mode
    (on the CPU); None for torch's own. In eval mode the frames are the middle ones.

    Raises ``LayoutError`` for other axes and clips of fewer frames than segments, ``ModelError`` for other options.
    """

    def __init__(
        self,
        num_classes: int = 400,
        *,
        backbone: str | nn.Module = "resnet50",
        num_segments: int = NUM_SEGMENTS,
        consensus: Consensus = "mean",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if num_segments < 1 or consensus not in ("mean", "max"):
            raise ModelError(f'{num_segments=}, {consensus=}; expected 1 segment or more, and "mean" or "max"')
        self.net = _image_model(backbone, num_classes) if isinstance(backbone, str) else backbone
        self.num_segments, self.consensus, self.generator = num_segments, consensus, generator
        self.classifier, self.num_features, self.stride_px = maps_of(self.net)

    @property
    def weights_target(self) -> nn.Module:
        """The net whose keys a weights file has."""
        return self.net

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        logits_BSN = self.segments(clip_BTCHW)
        return logits_BSN.mean(1) if self.consensus == "mean" else logits_BSN.amax(1)

    def segments(self, clip_BTCHW: Tensor) -> Tensor:
        """Logits of every segment (B, num_segments, num_classes)."""
        return PerFrame(self.net)(self.pick(clip_BTCHW))

    def features(self, clip_BTCHW: Tensor) -> Tensor:
        """Maps of every segment's frame, (B, num_segments, num_features, H', W')."""
        return PerFrame(FrameMaps(self.net))(self.pick(clip_BTCHW))

    def pick(self, clip_BTCHW: Tensor) -> Tensor:
        """The frame of every segment, (B, num_segments, 3, H, W); in training, each clip has its own."""
        check_frames("TSN", self.net, clip_BTCHW, min_frames=self.num_segments)
        num_clips, num_frames = clip_BTCHW.shape[:2]
        if not self.training:
            return clip_BTCHW[:, middle_frames(num_frames, self.num_segments)]
        points_BS = torch.rand(num_clips, self.num_segments, generator=self.generator, dtype=torch.float64)
        points_BS = (points_BS + torch.arange(self.num_segments)) * num_frames / self.num_segments
        picked_BS = points_BS.long().clamp_(max=num_frames - 1).to(clip_BTCHW.device)  # a product may round up to T
        return clip_BTCHW[torch.arange(num_clips, device=clip_BTCHW.device)[:, None], picked_BS]


def middle_frames(num_frames: int, num_segments: int) -> list[int]:
    """The frame at the middle of each segment, in whole numbers: floor((2 i + 1) T / (2 N))."""
    return [(2 * i + 1) * num_frames // (2 * num_segments) for i in range(num_segments)]


def _image_model(name: str, num_classes: int) -> nn.Module:
    from sidestream.models.create import create_model

    net = create_model(name, num_classes=num_classes).train()
    if (known := info_of(net)) is None or known.task != "image":
        raise ModelError(f"the backbone {name!r} does not classify images; give an image model of torchvision or timm")
    return net
