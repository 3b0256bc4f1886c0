"""The single-pathway 3D ResNet-50s: Slow, C2D and I3D-R50, as clip models and as chains of streaming layers.

Slow: the slow pathway alone of Feichtenhofer, Fan, Malik, He, "SlowFast Networks for Video Recognition" (ICCV 2019),
table 1 and section 4.1 ("Slow-only"). C2D and I3D-R50: the baselines of Wang, Girshick, Gupta, He, "Non-local Neural
Networks" (CVPR 2018), section 4, table 1. Layers, strides and numbers are those of pytorchvideo's ``slow_r50``,
``c2d_r50`` and ``i3d_r50`` (``models/hub/resnet.py``), whose files load strictly.

Differs from pytorchvideo: its last pooling has the size of the training clip, so that longer or larger ones are
averaged in overlapping windows; here every clip is averaged over all of time and space (the same on training size).
Fresh batch norms all begin at 1, also the last of each block.

Input: mean 0.45, deviation 0.225 (``pytorchvideo.transforms.create_video_transform``), 8 frames with a step of 8 (the
"8x8" of its model zoo), 224 x 224 (its pooling of 7 x 7); the resize to 256 before the crop is our choice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from sidestream.errors import WeightsError
from sidestream.models.clip_layout import as_stream_of, check_clip
from sidestream.models.info import ModelInfo
from sidestream.models.resnet3d_bottleneck import FrameHead, InARow, MaxPool, Sliding, linear, stage, stem
from sidestream.models.weights import KeyMap, StateDict
from sidestream.nn.combine import Chain, PerFrame
from sidestream.types import InputSpec

DEPTHS = (3, 4, 6, 3)
"""Blocks of the four stages of a ResNet-50."""
STRIDES_PX = (1, 2, 2, 2)
NUM_CLASSES = 400


@dataclass(frozen=True)
class Plan:
    """Where a net looks over time: taps of the stem, taps of each stage (repeated over its blocks), pool by pairs."""

    stem_taps: int
    stage_taps: tuple[tuple[int, ...], ...]
    has_time_pool: bool = False


PLANS = {
    "slow": Plan(1, ((1,), (1,), (3,), (3,))),
    "c2d": Plan(1, ((1,), (1,), (1,), (1,)), has_time_pool=True),
    "i3d": Plan(5, ((3,), (3, 1), (3, 1), (1, 3)), has_time_pool=True),
}
NAMES = {f"{kind}_r50{suffix}": (kind, bool(suffix)) for kind in PLANS for suffix in ("", "_causal")}
"""Name -> the plan, whether it is causal."""
DELAY_TICKS = {"slow": 9, "c2d": 1, "i3d": 18}
"""What all layers of a stream look ahead, together (0 in the causal variants)."""


def names() -> list[str]:
    return list(NAMES)


def info(name: str) -> ModelInfo:
    kind, is_causal = NAMES[name]
    spec = InputSpec(
        resize_px=256,
        mean=(0.45, 0.45, 0.45),
        std=(0.225, 0.225, 0.225),
        layout="BTCHW",
        num_frames=8,
        min_frames=_min_frames(PLANS[kind], is_causal),
        frame_step=8,
        causal=is_causal,
        delay_ticks=0 if is_causal else DELAY_TICKS[kind],
    )
    return ModelInfo(name, "sidestream", "clip", spec, NUM_CLASSES)


def build(name: str, num_classes: int | None) -> nn.Module:
    kind, is_causal = NAMES[name]
    return SinglePathway(PLANS[kind], num_classes or NUM_CLASSES, is_causal=is_causal)


def build_default(name: str) -> nn.Module:
    raise WeightsError(f"{name} has no default weights; give a local .safetensors or .pt file")


def key_map(name: str) -> KeyMap:
    return map_keys


def map_keys(state: StateDict) -> StateDict:
    """The keys of pytorchvideo's files as ours; our own are given back unchanged."""
    has_time_pool = any(key.startswith("blocks.5.res_blocks.") for key in state)  # it counts as a block there
    return {_renamed(key, has_time_pool): value for key, value in state.items()}


def block_keys(key: str) -> str:
    """pytorchvideo's names inside a residual block as ours."""
    key = re.sub(r"\bbranch2\.(conv|norm)_([abc])\.", r"\2.\1.", key)
    return re.sub(r"\bbranch1_(conv|norm)\.", r"skip.\1.", key)


class SinglePathway(nn.Module):
    """A 3D ResNet with one pathway: ``clip_BTCHW`` -> logits (B, num_classes), of maps averaged over time and space.

    Any size, and any length from ``min_frames`` on (trained on 8 frames of 224 x 224). ``depths``: blocks per stage.
    ``width``: channels of the stem. ``is_causal``: no answer sees a later frame; the same weights load, which were
    not trained for it.

    Raises ``LayoutError`` for other axes and for clips that are too short.
    """

    classifier = "head"
    stride_px = 32

    def __init__(
        self,
        plan: Plan,
        num_classes: int = NUM_CLASSES,
        *,
        depths: tuple[int, ...] = DEPTHS,
        width: int = 64,
        dropout: float = 0.5,
        is_causal: bool = False,
    ) -> None:
        super().__init__()
        self.min_frames = _min_frames(plan, is_causal)
        self.stem = stem(width, plan.stem_taps, is_causal=is_causal)
        self.stages = nn.ModuleList()
        in_channels, out_channels = width, 4 * width
        for depth, taps, stride_px in zip(depths, plan.stage_taps, STRIDES_PX, strict=True):
            taps = (taps * depth)[:depth]
            self.stages.append(stage(in_channels, out_channels, taps, stride_px=stride_px, is_causal=is_causal))
            in_channels, out_channels = out_channels, 2 * out_channels
        self.time_pool = MaxPool(Sliding((2, 1, 1), (2, 1, 1), is_causal)) if plan.has_time_pool else None
        self.num_features = in_channels
        self.dropout = nn.Dropout(dropout)
        self.head = linear(in_channels, num_classes)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(clip_BTCHW).mean((1, 3, 4))))

    def answers(self, clip_BTCHW: Tensor) -> Tensor:
        """Logits over time (B, T', num_classes): of every frame, or every second one behind a pooling by pairs.

        In eval mode their mean over time is ``forward``.
        """
        return self.head(self.dropout(self.features(clip_BTCHW).mean((3, 4))))

    def features(self, clip_BTCHW: Tensor) -> Tensor:
        """Maps before the last pooling, (B, T', num_features, ceil(H / 32), ceil(W / 32))."""
        check_clip(type(self).__name__, clip_BTCHW, min_frames=self.min_frames)
        maps_BCTHW = clip_BTCHW.transpose(1, 2)
        for part in self._trunk():
            maps_BCTHW = part(maps_BCTHW)
        return maps_BCTHW.transpose(1, 2)

    def streaming(self) -> Chain:
        """The net on a stream, its parameters shared: ``answers`` step by step. Use it in eval mode."""
        head = PerFrame(FrameHead(self.dropout, self.head))
        return as_stream_of(self, Chain(*(part.streaming() for part in self._trunk()), head))

    def streaming_features(self) -> Chain:
        """``features`` on a stream: maps (B, num_features, H', W') of every step in time."""
        return as_stream_of(self, Chain(*(part.streaming() for part in self._trunk())))

    def _trunk(self) -> list[InARow | MaxPool]:
        first, *rest = self.stages
        pool = [] if self.time_pool is None else [self.time_pool]
        return [self.stem, first, *pool, *rest]  # type: ignore[list-item]


def _min_frames(plan: Plan, is_causal: bool) -> int:
    return 2 if plan.has_time_pool and not is_causal else 1


def _renamed(key: str, has_time_pool: bool) -> str:
    key = re.sub(r"^blocks\.0\.", "stem.0.", key)
    key = re.sub(r"^blocks\.[56]\.proj\.", "head.", key)
    if match := re.match(r"^blocks\.(\d+)\.res_blocks\.", key):
        number = int(match[1]) - 1
        number -= 1 if has_time_pool and number > 0 else 0
        key = f"stages.{number}.{key[match.end() :]}"
    return block_keys(key)
