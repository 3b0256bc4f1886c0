"""A small net that draws heat maps of keypoints on every frame, cells 4 px wide; every layer is a stage.

A trunk in the manner of a narrow VGG (Simonyan and Zisserman, ICLR 2015), but with strides for its pools, and above it
two layers that double the maps, as in Xiao, Wu, Wei, "Simple Baselines for Human Pose Estimation" (ECCV 2018), here
without transposed convolutions:

    conv 32, 64, 128, 128, each / 2, and 128 (5 x 5)     up 96, 64, each x 2     1 x 1, one map per keypoint: 8 stages
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from sidestream.errors import ModelError, WeightsError
from sidestream.models.info import ModelInfo
from sidestream.models.layered_dense import LayeredDense, conv, doubled
from sidestream.models.weights import KeyMap
from sidestream.types import InputSpec

NUM_POINTS = 15
NUM_FRAMES = 16
SIZE_PX = 112
STRIDE_PX = 16
NAMES = {"keypoint_cnn": False, "keypoint_cnn_bn": True}
"""Name -> whether it has batch norms."""


def names() -> list[str]:
    return list(NAMES)


def info(name: str) -> ModelInfo:
    spec = InputSpec(size_px=(SIZE_PX, SIZE_PX), layout="BTCHW", num_frames=NUM_FRAMES, min_frames=1)
    return ModelInfo(name, "sidestream", "keypoints", spec, NUM_POINTS)


def build(name: str, num_classes: int | None) -> nn.Module:
    return keypoint_cnn(num_classes or NUM_POINTS, batch_norm=NAMES[name])


def build_default(name: str) -> nn.Module:
    raise WeightsError(f"{name} has no default weights; give a local .safetensors or .pt file")


def key_map(name: str) -> KeyMap:
    return dict


def keypoint_cnn(num_points: int = NUM_POINTS, *, width: float = 1.0, batch_norm: bool = False) -> LayeredDense:
    """``clip_BTCHW`` -> heat maps (B, T, num_points, H / 4, W / 4). ``width``: factor on all widths.

    Raises ``ModelError`` for a factor that leaves no channel.
    """
    wide = [round(each * width) for each in (32, 64, 128, 128, 128, 96, 64)]
    if min(wide) < 1:
        raise ModelError(f"a width factor of {width} leaves widths {wide}; give a larger one")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = conv(3, wide[0], kernel_px=5, stride_px=2, batch_norm=batch_norm)
    for number in (2, 3, 4):
        before, after = wide[number - 2], wide[number - 1]
        layers[f"conv{number}"] = conv(before, after, stride_px=2, batch_norm=batch_norm)
    layers["conv5"] = conv(wide[3], wide[4], kernel_px=5, batch_norm=batch_norm)
    layers["up6"] = doubled(conv(wide[4], wide[5], batch_norm=batch_norm))
    layers["up7"] = doubled(conv(wide[5], wide[6], batch_norm=batch_norm))
    layers["maps8"] = nn.Sequential(nn.Conv2d(wide[6], num_points, 1))
    net = LayeredDense(layers, multiple_px=STRIDE_PX)
    last: nn.Conv2d = net.get_submodule("net.maps8.0")  # type: ignore[assignment]
    nn.init.normal_(last.weight, std=0.01)
    return net
