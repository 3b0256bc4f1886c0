"""X3D-XS, S, M and L: clip models, and causal variants that stream.

Feichtenhofer, "X3D: Expanding Architectures for Efficient Video Recognition" (CVPR 2020), section 3.3 and table 3.
Layers and numbers are those of pytorchvideo's ``create_x3d`` (``models/x3d.py``), whose files load strictly.

Every second block gates its channels by their means over the whole clip, so the published net sees all frames
everywhere and has no exact stream. The causal variants (and ``StreamedX3D``) take the mean over the newest
frames instead, as many as the model was trained on: at the last frame of a clip of that length it is the published one.

Differs from pytorchvideo: logits, not probabilities; its last pooling has the size of the training clip, so that
longer or larger ones are averaged in overlapping windows; here every clip is averaged over all of time and space (the
same on training size). Fresh batch norms all begin at 1, also the last of each block.

Input: mean 0.45, deviation 0.225 (``pytorchvideo.transforms.create_video_transform``); frames and size as in the
docstring of ``create_x3d``; frame steps as in its model zoo (4x12, 13x6, 16x5; 16x5 also for L, from PySlowFast's);
the resize before the crop, in the ratio of 256 to 224, is our choice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sidestream.errors import WeightsError
from sidestream.models.clip_layout import as_stream_of, check_clip
from sidestream.models.info import ModelInfo
from sidestream.models.resnet3d_bottleneck import FrameHead, Unit, relu
from sidestream.models.slowfast_single import block_keys
from sidestream.models.weights import KeyMap, StateDict
from sidestream.models.x3d_layers import BOTTLENECK_FACTOR, Plan, ProjectedHead
from sidestream.nn.combine import Chain, PerFrame
from sidestream.types import InputSpec

NUM_CLASSES = 400


@dataclass(frozen=True)
class Size:
    """What sets one of the models apart."""

    num_frames: int
    frame_step: int
    size_px: int
    resize_px: int
    depths: tuple[int, ...] = (3, 5, 11, 7)


SIZES = {
    "xs": Size(4, 12, 160, 182),
    "s": Size(13, 6, 160, 182),
    "m": Size(16, 5, 224, 256),
    "l": Size(16, 5, 312, 356, (5, 10, 25, 15)),
}
NAMES = {f"x3d_{size}{suffix}": (size, bool(suffix)) for size in SIZES for suffix in ("", "_causal")}
"""Name -> the size, whether it is causal."""


def names() -> list[str]:
    return list(NAMES)


def info(name: str) -> ModelInfo:
    key, is_causal = NAMES[name]
    size = SIZES[key]
    spec = InputSpec(
        size_px=(size.size_px, size.size_px),
        resize_px=size.resize_px,
        mean=(0.45, 0.45, 0.45),
        std=(0.225, 0.225, 0.225),
        layout="BTCHW",
        num_frames=size.num_frames,
        min_frames=1,
        frame_step=size.frame_step,
        causal=is_causal,
    )
    return ModelInfo(name, "sidestream", "clip", spec, NUM_CLASSES)


def build(name: str, num_classes: int | None) -> nn.Module:
    key, is_causal = NAMES[name]
    size = SIZES[key]
    if not is_causal:
        return X3D(num_classes or NUM_CLASSES, depths=size.depths)
    return StreamedX3D(num_classes or NUM_CLASSES, depths=size.depths, squeeze_frames=size.num_frames, is_causal=True)


def build_default(name: str) -> nn.Module:
    raise WeightsError(f"{name} has no default weights; give a local .safetensors or .pt file")


def key_map(name: str) -> KeyMap:
    return map_keys


def map_keys(state: StateDict) -> StateDict:
    """The keys of pytorchvideo's files as ours; our own are given back unchanged."""
    return {_renamed(key): value for key, value in state.items()}


class X3D(nn.Module):
    """X3D: ``clip_BTCHW`` -> logits (B, num_classes), of maps averaged over time and space. Any length, any size.

    ``depths``, ``widths``: blocks and channels of the stages (the stem has those of the first). ``num_inner``: width
    of the head. ``plan``: how its layers see time; the same weights load in every form. This class has no streaming
    form (see ``StreamedX3D``).

    Raises ``LayoutError`` for other axes.
    """

    classifier = "head"
    stride_px = 32
    min_frames = 1

    def __init__(
        self,
        num_classes: int = NUM_CLASSES,
        *,
        depths: tuple[int, ...] = (3, 5, 11, 7),
        widths: tuple[int, ...] = (24, 48, 96, 192),
        num_inner: int = 2048,
        dropout: float = 0.5,
        plan: Plan | None = None,
    ) -> None:
        super().__init__()
        plan = plan or Plan()
        self.stem = plan.stem(widths[0])
        self.stages = nn.ModuleList()
        in_channels = widths[0]
        for depth, out_channels in zip(depths, widths, strict=True):
            self.stages.append(plan.stage(in_channels, out_channels, depth))
            in_channels = out_channels
        self.num_features = int(BOTTLENECK_FACTOR * in_channels)
        self.expand = Unit(in_channels, self.num_features, plan.window(1), activation=relu())
        self.head = ProjectedHead(self.num_features, num_inner, num_classes, dropout)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self.head(self.features(clip_BTCHW).mean((1, 3, 4)))

    def answers(self, clip_BTCHW: Tensor) -> Tensor:
        """Logits of every frame (B, T, num_classes): the head on that frame's own mean over space.

        Their mean is not ``forward``, whose head has a ReLU behind the mean over time.
        """
        return self.head(self.features(clip_BTCHW).mean((3, 4)))

    def features(self, clip_BTCHW: Tensor) -> Tensor:
        """Maps before the last pooling, (B, T, num_features, ceil(H / 32), ceil(W / 32))."""
        check_clip("X3D", clip_BTCHW)
        maps_BCTHW = clip_BTCHW.transpose(1, 2)
        for part in (self.stem, *self.stages, self.expand):
            maps_BCTHW = part(maps_BCTHW)
        return maps_BCTHW.transpose(1, 2)


class StreamedX3D(X3D):
    """X3D whose gates see the mean of the newest ``squeeze_frames`` frames: a clip form and a streaming form.

    ``is_causal``: all temporal padding lies in the past, so no answer sees a later frame. ``options``: those of X3D.
    """

    def __init__(
        self, num_classes: int = NUM_CLASSES, *, squeeze_frames: int, is_causal: bool = True, **options: Any
    ) -> None:
        super().__init__(num_classes, plan=Plan(squeeze_frames, is_causal), **options)

    def streaming(self) -> Chain:
        """The net on a stream, its parameters shared: ``answers`` frame by frame. Use it in eval mode."""
        return as_stream_of(self, Chain(*self._trunk(), PerFrame(FrameHead(nn.Identity(), self.head))))

    def streaming_features(self) -> Chain:
        """``features`` on a stream: maps (B, num_features, H', W') of every frame."""
        return as_stream_of(self, Chain(*self._trunk()))

    def _trunk(self) -> list[Chain]:
        return [part.streaming() for part in (self.stem, *self.stages, self.expand)]  # type: ignore[operator]


_KEYS = (
    (r"^blocks\.0\.conv\.conv_t\.", "stem.0.conv."),  # the one over space is called conv_t there, and conv_xy over time
    (r"^blocks\.0\.conv\.conv_xy\.", "stem.1.conv."),
    (r"^blocks\.0\.norm\.", "stem.1.norm."),
    (r"^blocks\.5\.pool\.pre_", "expand."),
    (r"^blocks\.5\.pool\.post_conv\.", "head.project."),
    (r"^blocks\.5\.proj\.", "head.linear."),
    (r"\bbranch2\.norm_b\.0\.", "b.norm."),
    (r"\bbranch2\.norm_b\.1\.block\.0\.", "middle.reduce."),
    (r"\bbranch2\.norm_b\.1\.block\.2\.", "middle.expand."),
)


def _renamed(key: str) -> str:
    for pattern, replacement in _KEYS:
        key = re.sub(pattern, replacement, key)
    if match := re.match(r"^blocks\.(\d+)\.res_blocks\.", key):
        key = f"stages.{int(match[1]) - 1}.{key[match.end() :]}"
    return block_keys(key)
