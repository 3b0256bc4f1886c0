"""Convolutional auto-encoders on every frame: they draw the frame, or one to come; every layer is a stage.

The papers on Sideways (Malinowski et al., CVPR 2020 and 2021) train auto-encoders and nets that draw future frames, of
which the layers are not known to us. These are our own: convolutions with stride 2 down to a narrow middle, and as
many that double the size again.

    conv_autoencoder         32, 64, 128, 128, each / 2      128, 64, 32, 3, each x 2     middle 1/16, 8 stages
    conv_autoencoder_small   16, 32, 32, each / 2            32, 16, 3, each x 2          middle 1/8, 6 stages

Answers are pictures in the space of the input: normalised as the input spec says, not bounded.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import nn

from sidestream.errors import ModelError, WeightsError
from sidestream.models.info import ModelInfo
from sidestream.models.layered_dense import LayeredDense, conv, doubled
from sidestream.models.weights import KeyMap
from sidestream.types import InputSpec

CHANNELS = 3
NUM_FRAMES = 16
NAMES: dict[str, tuple[tuple[int, ...], int]] = {
    "conv_autoencoder": ((32, 64, 128, 128), 112),
    "conv_autoencoder_small": ((16, 32, 32), 64),
}
"""Name -> widths of the encoder, height and width of its frames."""


def names() -> list[str]:
    return list(NAMES)


def info(name: str) -> ModelInfo:
    side = NAMES[name][1]
    half = (0.5, 0.5, 0.5)
    spec = InputSpec((side, side), mean=half, std=half, layout="BTCHW", num_frames=NUM_FRAMES, min_frames=1)
    return ModelInfo(name, "sidestream", "pictures", spec, CHANNELS)


def build(name: str, num_classes: int | None) -> nn.Module:
    if num_classes not in (None, CHANNELS):
        raise ModelError(
            f"{name} answers pictures with {CHANNELS} channels, but {num_classes=} was given; leave it out"
        )
    return conv_autoencoder(NAMES[name][0])


def build_default(name: str) -> nn.Module:
    raise WeightsError(f"{name} has no default weights; give a local .safetensors or .pt file")


def key_map(name: str) -> KeyMap:
    return dict


def conv_autoencoder(widths: tuple[int, ...]) -> LayeredDense:
    """``widths``: of the encoder, each half the size of the one before; the decoder goes back through them.

    Raises ``ModelError`` for no width, or one below 1.
    """
    if not widths or min(widths) < 1:
        raise ModelError(f"{widths = }; give one or more widths of 1 or more")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (before, after) in enumerate(pairwise((CHANNELS, *widths)), start=1):
        layers[f"down{number}"] = conv(before, after, stride_px=2)
    for number, (before, after) in enumerate(pairwise(widths[::-1]), start=len(widths) + 1):
        layers[f"up{number}"] = doubled(conv(before, after))
    last = nn.Sequential(nn.Conv2d(widths[0], CHANNELS, 3, padding=1))
    layers[f"up{2 * len(widths)}"] = doubled(last)
    return LayeredDense(layers, multiple_px=2 ** len(widths))
