"""3D convolutional models by name: C3D, R3D-18, MC3-18, R(2+1)D-18 and -50, S3D, and a causal variant of each.

- R3D, MC3, R(2+1)D: Tran et al., "A Closer Look at Spatiotemporal Convolutions for Action Recognition" (CVPR 2018),
  section 3; S3D: Xie et al., "Rethinking Spatiotemporal Feature Learning" (ECCV 2018), without the gating of S3D-G.
  They are torchvision's nets (its weights files load strictly), run as ``conv3d_net`` says.
- R(2+1)D-50 is torchvision's net with bottlenecks in 3, 4, 6, 3 blocks. Its middle channels are those of section 3.5
  (``num_middle``) for the convolution that is factored; torchvision's own bottleneck puts the block's input in their
  place. The stem has torchvision's 45.
- C3D: see ``c3d``.

The causal variants ("masked" convolutions: ``NAME_causal``) take the same weights files. There are no default weights
for them, since none were trained for it.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from torch import nn

from sidestream.errors import WeightsError
from sidestream.models import torchvision_zoo
from sidestream.models.c3d import C3DLayers
from sidestream.models.conv3d_net import Conv3dNet
from sidestream.models.info import ModelInfo
from sidestream.models.labels import kinetics400_labels
from sidestream.models.weights import KeyMap, StateDict

DELAY_TICKS = {"c3d": 45, "r3d_18": 54, "mc3_18": 5, "r2plus1d_18": 54, "r2plus1d_50": 53, "s3d": 59}
"""What all layers of the stream look ahead, together; 0 in the causal variants."""
MIN_FRAMES = {"c3d": 16, "s3d": 13}
"""Fewest frames of a clip where it is not 1, as it is in the causal variants."""
FROM_TORCHVISION = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")
BOTTLENECKS_50 = (3, 4, 6, 3)
_CAUSAL = "_causal"


def names() -> list[str]:
    return [full for name in DELAY_TICKS for full in (name, name + _CAUSAL)]


def info(name: str) -> ModelInfo:
    plain, is_causal = _split(name)
    like = torchvision_zoo.info(plain if plain in FROM_TORCHVISION else "r3d_18")
    spec = like.input_spec.replace(
        min_frames=1 if is_causal else MIN_FRAMES.get(plain, 1),
        causal=is_causal,
        delay_ticks=0 if is_causal else DELAY_TICKS[plain],
    )
    weights = like.default_weights if plain in FROM_TORCHVISION and not is_causal else None
    return ModelInfo(name, "sidestream", "clip", spec, 400, kinetics400_labels(), weights)


def build(name: str, num_classes: int | None) -> nn.Module:
    plain, is_causal = _split(name)
    return Conv3dNet(_fresh_net(plain, num_classes or 400), is_causal=is_causal)


def build_default(name: str) -> nn.Module:
    from torchvision.models import get_model, get_model_weights

    plain, is_causal = _split(name)
    if is_causal or plain not in FROM_TORCHVISION:
        raise WeightsError(f"{name} has no default weights; give a local .safetensors or .pt file")
    return Conv3dNet(get_model(plain, weights=get_model_weights(plain).DEFAULT, progress=False))


def key_map(name: str) -> KeyMap:
    return map_s3d_keys if _split(name)[0] == "s3d" else dict


# What becomes of the keys of the public Kinetics S3D (kylemin/S3D), one rule after the other; torchvision's fit none.
_S3D = (
    (r"^base\.(\d+)\.", r"features.\1."),
    (r"\.branch0\.0\.", ".branch0."),
    (r"\.conv_s\.", ".0.0."),
    (r"\.bn_s\.", ".0.1."),
    (r"\.conv_t\.", ".1.0."),
    (r"\.bn_t\.", ".1.1."),
    (r"\.conv\.", ".0."),
    (r"\.bn\.", ".1."),
    (r"^fc\.0\.", "classifier.1."),
)


def map_s3d_keys(state: StateDict) -> StateDict:
    """The keys of the public Kinetics S3D as torchvision's; torchvision's own are given back unchanged."""
    return {_s3d_key(key): value for key, value in state.items()}


def _s3d_key(key: str) -> str:
    for pattern, replacement in _S3D if key.startswith(("base.", "fc.0.")) else ():
        key = re.sub(pattern, replacement, key)
    return key


def num_middle(in_channels: int, out_channels: int, *, frames: int = 3, px: int = 3) -> int:
    """Channels between the convolution in space and the one in time: floor(t d^2 N_in N_out / (d^2 N_in + t N_out)).

    With so many, the two have about the parameters of the t x d x d convolution that they stand for (Tran et al. 2018,
    section 3.5).
    """
    return (frames * px**2 * in_channels * out_channels) // (px**2 * in_channels + frames * out_channels)


def _fresh_net(plain: str, num_classes: int) -> nn.Module:
    from torchvision.models import get_model
    from torchvision.models.video.resnet import Bottleneck, R2Plus1dStem, VideoResNet

    if plain == "c3d":
        return C3DLayers(num_classes)
    if plain == "r2plus1d_50":
        return VideoResNet(Bottleneck, [_factored()] * 4, list(BOTTLENECKS_50), R2Plus1dStem, num_classes=num_classes)
    return get_model(plain, weights=None, num_classes=num_classes)


@cache
def _factored() -> Any:
    """torchvision's Conv2Plus1D with the paper's middle channels, whatever the block asks for."""
    from torchvision.models.video.resnet import Conv2Plus1D

    class Factored(Conv2Plus1D):
        def __init__(self, in_planes: int, out_planes: int, midplanes: int, stride: int = 1, padding: int = 1) -> None:
            super().__init__(in_planes, out_planes, num_middle(in_planes, out_planes), stride, padding)

    return Factored


def _split(name: str) -> tuple[str, bool]:
    """(name of the plain variant, whether ``name`` is the causal one)."""
    return name.removesuffix(_CAUSAL), name.endswith(_CAUSAL)
