"""SlowFast-R50, two pathways with lateral connections: a clip model, and a stream that answers every alpha frames.

Feichtenhofer, Fan, Malik, He, "SlowFast Networks for Video Recognition" (ICCV 2019), section 3 and table 1; lateral
connections are time-strided convolutions (section 3.3). Layers and numbers are those of pytorchvideo's
``slowfast_r50`` (``models/slowfast.py``; alpha 4, a lateral kernel of 7 frames), whose files load strictly.

One clip goes in: the frames of the fast pathway, of which the slow one takes 0, alpha, 2 alpha, ... as a stream must.
Differs from published samplers, which take ``linspace(0, T - 1, T / alpha)``, so that the first and last frames of
both pathways agree; ``forward_pathways`` takes both clips as sampled elsewhere.

Differs from pytorchvideo: its last poolings have the size of the training clip, so that longer or larger ones are
averaged in overlapping windows; here both pathways are averaged over all of time and space (the same on training
size). Fresh batch norms all begin at 1, also the last of each block.

Training in bfloat16 on a CPU needs clips of 9 frames or more (``alpha`` 4); ``fit`` refuses shorter ones. With fewer,
the slow pathway holds two frames, and for a bfloat16 ``conv3d`` whose kernel of 3 frames is longer than its input of
2, torch 2.15's oneDNN gives weight gradients of arbitrary size or NaN (seen with avx512_bf16; right with
``torch.backends.mkldnn`` off, in float32, and when the zeros are padded before the convolution).

Input: mean 0.45, deviation 0.225 (``pytorchvideo.transforms.create_video_transform``); the "8x8" of its model zoo is 8
slow frames with a step of 8, so 32 fast ones with a step of 2; 224 x 224 (its pooling of 7 x 7); the resize to 256
before the crop is our choice.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestream.errors import LayoutError, WeightsError
from sidestream.models import slowfast_single
from sidestream.models.clip_layout import as_stream_of, check_clip
from sidestream.models.info import ModelInfo
from sidestream.models.resnet3d_bottleneck import FrameHead, InARow, Sliding, Unit, linear, relu, stage, stem
from sidestream.models.slowfast_single import DEPTHS, NUM_CLASSES, STRIDES_PX, block_keys
from sidestream.models.slowfast_stream import Stage, two_pathways
from sidestream.models.weights import KeyMap, StateDict
from sidestream.nn.combine import Chain, PerFrame

NAMES = {"slowfast_r50": False, "slowfast_r50_causal": True}
"""Name -> whether it is causal."""
ALPHA = 4
"""Fast frames for each slow one."""
BETA_INVERSE = 8
"""Slow channels for each fast one."""
LATERAL_TAPS, LATERAL_WIDENING = 7, 2
"""Fast frames that a lateral connection sees, and its channels for each fast one."""
SLOW_TAPS, FAST_TAPS = (1, 1, 1, 3, 3), (5, 3, 3, 3, 3)
"""Frames that the stem and the first convolutions of each stage see, in each pathway."""
DELAY_TICKS = 48
"""Frames that all layers of the stream look ahead, together (0 in the causal variant)."""


def names() -> list[str]:
    return list(NAMES)


def info(name: str) -> ModelInfo:
    is_causal = NAMES[name]
    spec = slowfast_single.info("slow_r50").input_spec.replace(
        num_frames=32,
        min_frames=1 if is_causal else ALPHA,
        frame_step=2,
        causal=is_causal,
        delay_ticks=0 if is_causal else DELAY_TICKS,
    )
    return ModelInfo(name, "sidestream", "clip", spec, NUM_CLASSES)


def build(name: str, num_classes: int | None) -> nn.Module:
    return SlowFast(num_classes or NUM_CLASSES, is_causal=NAMES[name])


def build_default(name: str) -> nn.Module:
    raise WeightsError(f"{name} has no default weights; give a local .safetensors or .pt file")


def key_map(name: str) -> KeyMap:
    return map_keys


def map_keys(state: StateDict) -> StateDict:
    """The keys of pytorchvideo's files as ours; our own are given back unchanged."""
    return {_renamed(key): value for key, value in state.items()}


class Pathway(nn.Module):
    """Stem and stages; ``extra``: channels that join before each stage, for each 1 of the stage before."""

    def __init__(self, width: int, taps: tuple[int, ...], depths: tuple[int, ...], is_causal: bool, *, extra: int = 0):
        super().__init__()
        self.stem = stem(width, taps[0], is_causal=is_causal)
        self.stages = nn.ModuleList()
        in_channels, out_channels = width, 4 * width
        for depth, num_taps, stride_px in zip(depths, taps[1:], STRIDES_PX, strict=True):
            joined = in_channels + in_channels * extra // BETA_INVERSE
            self.stages.append(
                stage(joined, out_channels, (num_taps,) * depth, stride_px=stride_px, is_causal=is_causal)
            )
            in_channels, out_channels = out_channels, 2 * out_channels
        self.num_features = in_channels

    @property
    def parts(self) -> list[InARow]:
        return [self.stem, *self.stages]  # type: ignore[list-item]


class SlowFast(nn.Module):
    """SlowFast: ``clip_BTCHW``, the fast frames -> logits (B, num_classes), of maps averaged over time and space.

    Any size, and any length from ``min_frames`` on (trained on 32 frames of 224 x 224). ``depths``: blocks per stage.
    ``width``: channels of the slow stem, a multiple of 8. ``alpha``: fast frames for each slow one. ``is_causal``: no
    answer sees a later frame; the same weights load, which were not trained for it.

    Raises ``LayoutError`` for other axes and for clips that are too short.
    """

    classifier = "head"
    stride_px = 32

    def __init__(
        self,
        num_classes: int = NUM_CLASSES,
        *,
        depths: tuple[int, ...] = DEPTHS,
        width: int = 64,
        alpha: int = ALPHA,
        dropout: float = 0.5,
        is_causal: bool = False,
    ) -> None:
        super().__init__()
        self.alpha, self.is_causal = alpha, is_causal
        self.min_frames = 1 if is_causal else alpha
        self.slow = Pathway(width, SLOW_TAPS, depths, is_causal, extra=LATERAL_WIDENING)
        self.fast = Pathway(width // BETA_INVERSE, FAST_TAPS, depths, is_causal)
        window = Sliding((LATERAL_TAPS, 1, 1), (alpha, 1, 1), is_causal)
        fast_channels = [width // BETA_INVERSE * factor for factor in (1, 4, 8, 16)]
        self.laterals = nn.ModuleList(Unit(n, LATERAL_WIDENING * n, window, activation=relu()) for n in fast_channels)
        self.num_features = self.slow.num_features + self.fast.num_features
        self.dropout = nn.Dropout(dropout)
        self.head = linear(self.num_features, num_classes)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        self._check(clip_BTCHW)
        return self.forward_pathways(clip_BTCHW[:, :: self.alpha], clip_BTCHW)

    def forward_pathways(self, slow_BTCHW: Tensor, fast_BTCHW: Tensor) -> Tensor:
        """Logits (B, num_classes) for frames of both pathways that were chosen elsewhere.

        Raises ``LayoutError`` unless there is one slow frame for each ``alpha`` fast ones (rounded up).
        """
        self._check(fast_BTCHW)
        check_clip("SlowFast's slow pathway", slow_BTCHW)
        if slow_BTCHW.shape[1] != (wanted := -(-fast_BTCHW.shape[1] // self.alpha)):
            raise LayoutError(
                f"SlowFast was given {slow_BTCHW.shape[1]} slow frames and {fast_BTCHW.shape[1]} fast ones; with "
                f"alpha = {self.alpha} it needs {wanted} slow ones: sample every {self.alpha}th frame"
            )
        slow_BCTHW, fast_BCTHW = self._maps(slow_BTCHW, fast_BTCHW)
        if self.is_causal:
            pooled_BC = self._joined(slow_BCTHW, fast_BCTHW).mean((2, 3, 4))
        else:
            pooled_BC = torch.cat([slow_BCTHW.mean((2, 3, 4)), fast_BCTHW.mean((2, 3, 4))], dim=1)
        return self.head(self.dropout(pooled_BC))

    def answers(self, clip_BTCHW: Tensor) -> Tensor:
        """Logits over time (B, T', num_classes), one per slow step: of its slow map and the mean of alpha fast ones.

        Those are the fast maps from the slow frame on; an incomplete last group gives no answer (T' = T // alpha). In
        the causal variant they are those up to the slow frame, zeros standing for what was before the first (T' =
        ceil(T / alpha)). In eval mode the mean over time is ``forward``: for lengths divisible by alpha, and for any
        in the causal variant.
        """
        return self.head(self.dropout(self.features(clip_BTCHW).mean((3, 4))))

    def features(self, clip_BTCHW: Tensor) -> Tensor:
        """Maps before the last pooling over space, (B, T', num_features, ceil(H / 32), ceil(W / 32)); see ``answers``.

        Slow channels come first, then those of the fast pathway.
        """
        self._check(clip_BTCHW)
        return self._joined(*self._maps(clip_BTCHW[:, :: self.alpha], clip_BTCHW)).transpose(1, 2)

    def streaming(self) -> Chain:
        """The net on a stream, its parameters shared: ``answers``, one every alpha ticks. Use it in eval mode.

        The causal one can be cut between its stages; otherwise both pathways are one layer (see ``two_pathways``).
        """
        head = PerFrame(FrameHead(self.dropout, self.head))
        return as_stream_of(self, Chain(*self._pathways().layers, head))

    def streaming_features(self) -> Chain:
        """``features`` on a stream: maps (B, num_features, H', W') every alpha ticks."""
        return as_stream_of(self, self._pathways())

    def _pathways(self) -> Chain:
        laterals = [*self.laterals, None]
        stages = [
            Stage(slow.streaming(), fast.streaming(), lateral.streaming() if isinstance(lateral, Unit) else None)
            for slow, fast, lateral in zip(self.slow.parts, self.fast.parts, laterals, strict=True)
        ]
        return two_pathways(stages, alpha=self.alpha, is_causal=self.is_causal)

    def _maps(self, slow_BTCHW: Tensor, fast_BTCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Maps of both pathways (B, C, T, H, W), at their own rates."""
        slow_BCTHW, fast_BCTHW = slow_BTCHW.transpose(1, 2), fast_BTCHW.transpose(1, 2)
        for n, (slow, fast) in enumerate(zip(self.slow.parts, self.fast.parts, strict=True)):
            slow_BCTHW, fast_BCTHW = slow(slow_BCTHW), fast(fast_BCTHW)
            if n < len(self.laterals):
                slow_BCTHW = torch.cat([slow_BCTHW, self.laterals[n](fast_BCTHW)], dim=1)
        return slow_BCTHW, fast_BCTHW

    def _joined(self, slow_BCTHW: Tensor, fast_BCTHW: Tensor) -> Tensor:
        """The slow maps beside the mean of their alpha fast ones."""
        window = Sliding((self.alpha, 1, 1), (self.alpha, 1, 1), self.is_causal)
        fast_BCTHW = F.avg_pool3d(window.padded(fast_BCTHW), window.kernel, window.stride)
        return torch.cat([slow_BCTHW[:, :, : fast_BCTHW.shape[2]], fast_BCTHW], dim=1)

    def _check(self, clip_BTCHW: Tensor) -> None:
        check_clip("SlowFast", clip_BTCHW, min_frames=self.min_frames)


def _renamed(key: str) -> str:
    key = re.sub(r"^blocks\.(\d+)\.multipathway_fusion\.norm\.", r"laterals.\1.norm.", key)
    key = re.sub(r"^blocks\.(\d+)\.multipathway_fusion\.conv_fast_to_slow\.", r"laterals.\1.conv.", key)
    key = re.sub(r"^blocks\.6\.proj\.", "head.", key)
    if match := re.match(r"^blocks\.(\d+)\.multipathway_blocks\.([01])\.(res_blocks\.)?", key):
        number, pathway, rest = int(match[1]), ("slow", "fast")[int(match[2])], key[match.end() :]
        key = f"{pathway}.stem.0.{rest}" if number == 0 else f"{pathway}.stages.{number - 1}.{rest}"
    return block_keys(key)
