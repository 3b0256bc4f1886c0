"""I3D, the inflated Inception-v1: a clip model and, on the same parameters, a chain of streaming layers.

Carreira, Zisserman, "Quo Vadis, Action Recognition?" (CVPR 2017), figure 3. The keys of its weights are those of the
public PyTorch ports (``Mixed_3b.b1a.conv3d.weight``), so files made from DeepMind's Kinetics weights load strictly.
Padding is TensorFlow's 'SAME', which depends on the length and size of what is padded:

    outputs = ceil(size / stride); total = max((outputs - 1) * stride + kernel - size, 0); front = total // 2

A stream has no length, so it is padded as lengths divisible by the strides are (8 frames in all); for those, clip
form and stream agree on every answer, edges included.

Differs from the paper: frames are resized to 224 on the shorter side (there: 256, then cropped to 224); no dropout;
maps smaller than 7 x 7 are pooled whole, and larger ones give answers at several places, which are averaged.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from sidestream.errors import WeightsError
from sidestream.models.clip_layout import as_stream_of, check_clip
from sidestream.models.i3d_layers import Logits, Sliding, Triple, TrunkLayer, trunk_layer
from sidestream.models.info import ModelInfo
from sidestream.models.labels import kinetics400_labels
from sidestream.models.weights import KeyMap
from sidestream.nn.combine import Chain
from sidestream.types import InputSpec

# Name; channels of a convolution (1), of a mixed block (6: b0, b1a, b1b, b2a, b2b, b3b) or of none, for a maximum
# pooling; kernel; stride.
TRUNK: tuple[tuple[str, tuple[int, ...], Triple, Triple], ...] = (
    ("Conv3d_1a_7x7", (64,), (7, 7, 7), (2, 2, 2)),
    ("MaxPool3d_2a_3x3", (), (1, 3, 3), (1, 2, 2)),
    ("Conv3d_2b_1x1", (64,), (1, 1, 1), (1, 1, 1)),
    ("Conv3d_2c_3x3", (192,), (3, 3, 3), (1, 1, 1)),
    ("MaxPool3d_3a_3x3", (), (1, 3, 3), (1, 2, 2)),
    ("Mixed_3b", (64, 96, 128, 16, 32, 32), (3, 3, 3), (1, 1, 1)),
    ("Mixed_3c", (128, 128, 192, 32, 96, 64), (3, 3, 3), (1, 1, 1)),
    ("MaxPool3d_4a_3x3", (), (3, 3, 3), (2, 2, 2)),
    ("Mixed_4b", (192, 96, 208, 16, 48, 64), (3, 3, 3), (1, 1, 1)),
    ("Mixed_4c", (160, 112, 224, 24, 64, 64), (3, 3, 3), (1, 1, 1)),
    ("Mixed_4d", (128, 128, 256, 24, 64, 64), (3, 3, 3), (1, 1, 1)),
    ("Mixed_4e", (112, 144, 288, 32, 64, 64), (3, 3, 3), (1, 1, 1)),
    ("Mixed_4f", (256, 160, 320, 32, 128, 128), (3, 3, 3), (1, 1, 1)),
    ("MaxPool3d_5a_2x2", (), (2, 2, 2), (2, 2, 2)),
    ("Mixed_5b", (256, 160, 320, 32, 128, 128), (3, 3, 3), (1, 1, 1)),
    ("Mixed_5c", (384, 192, 384, 48, 128, 128), (3, 3, 3), (1, 1, 1)),
)
TIME_STRIDE = 8
"""Frames from one answer of the net to the next."""
MIN_FRAMES = TIME_STRIDE + 1
"""The shortest clip whose last map has the 2 steps in time that are averaged (the causal variant takes any)."""
DELAY_TICKS = 62
"""What all layers of the stream look ahead, together."""

NAMES = {"i3d": False, "i3d_causal": True}
"""Name -> whether it is causal."""


def names() -> list[str]:
    return list(NAMES)


def info(name: str) -> ModelInfo:
    is_causal = NAMES[name]
    half = (0.5, 0.5, 0.5)
    spec = InputSpec(
        resize_px=224,
        mean=half,
        std=half,
        layout="BTCHW",
        num_frames=64,
        min_frames=1 if is_causal else MIN_FRAMES,
        causal=is_causal,
        delay_ticks=0 if is_causal else DELAY_TICKS,
    )
    return ModelInfo(name, "sidestream", "clip", spec, 400, kinetics400_labels())


def build(name: str, num_classes: int | None) -> nn.Module:
    return I3D(num_classes or 400, is_causal=NAMES[name])


def build_default(name: str) -> nn.Module:
    raise WeightsError(f"{name} has no default weights; give a local .safetensors or .pt file")


def key_map(name: str) -> KeyMap:
    return dict


class I3D(nn.Module):
    """Inflated Inception-v1: ``clip_BTCHW``, values rgb * 2 - 1 -> logits (B, num_classes), the mean over time.

    Any length from ``MIN_FRAMES`` on (trained on 64), any size (trained on 224 x 224). ``width``: factor on all
    channels. ``is_causal``: no answer sees a later frame; temporal padding lies in the past. It takes the same
    weights, which were not trained for it.

    Raises ``LayoutError`` for other axes and for clips that are too short.
    """

    classifier = "logits"
    stride_px = 32

    def __init__(self, num_classes: int = 400, *, width: float = 1.0, is_causal: bool = False) -> None:
        super().__init__()
        self.min_frames = 1 if is_causal else MIN_FRAMES
        num_channels = 3
        for name, channels, kernel, stride in TRUNK:
            window = Sliding(kernel, stride, is_causal)
            layer, num_channels = trunk_layer(num_channels, tuple(max(1, round(c * width)) for c in channels), window)
            self.add_module(name, layer)
        self.num_features = num_channels
        self.logits = Logits(num_channels, num_classes, is_causal=is_causal)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self.answers(clip_BTCHW).mean(1)

    def answers(self, clip_BTCHW: Tensor) -> Tensor:
        """Logits over time (B, T', num_classes): one for every 8 frames, less the one that the last pooling takes."""
        return self.logits(self.features(clip_BTCHW).transpose(1, 2))

    def features(self, clip_BTCHW: Tensor) -> Tensor:
        """Maps before the last pooling, (B, ceil(T / 8), 1024, ceil(H / 32), ceil(W / 32))."""
        check_clip("I3D", clip_BTCHW, min_frames=self.min_frames)
        maps_BCTHW = clip_BTCHW.transpose(1, 2)
        for layer in self._trunk():
            maps_BCTHW = layer(maps_BCTHW)
        return maps_BCTHW.transpose(1, 2)

    def streaming(self) -> Chain:
        """The net on a stream, its parameters shared: logits (B, num_classes) every 8 ticks, 62 ticks late.

        Its clip form is ``answers`` for lengths divisible by 8, and differs at the edges for others. In the causal
        variant the delay is 0, and every length agrees. Use it in eval mode: batch norms work frame by frame.
        """
        return as_stream_of(self, Chain(*(layer.streaming() for layer in self._trunk()), self.logits.streaming()))

    def streaming_features(self) -> Chain:
        """``features`` on a stream: maps (B, num_features, H', W') every 8 ticks."""
        return as_stream_of(self, Chain(*(layer.streaming() for layer in self._trunk())))

    def _trunk(self) -> Iterator[TrunkLayer]:
        return (self.get_submodule(name) for name, *_ in TRUNK)  # type: ignore[misc]
