"""Image models of timm by name; a tag chooses among its weights: ``timm/vit_tiny_patch16_224.augreg_in21k``."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from torch import nn

from sidestream.models.guard import ANY_SIZE, SizeRule
from sidestream.models.info import ModelInfo
from sidestream.models.labels import imagenet_labels
from sidestream.models.weights import KeyMap
from sidestream.types import InputSpec

# Modules of timm whose models take any size, although its settings say that their size is fixed.
_ANY_SIZE = {"crossvit", "efficientvit_msra", "mvitv2", "sequencer", "swiftformer", "twins", "xcit"}
# Modules of timm -> what heights and widths must be multiples of, in pixels.
_MULTIPLES_PX = {
    "csatv2": 8,
    "deepseek_vit": 14,
    "dla": 32,
    "gemma4_vit": 16,
    "hieradet_sam2": 32,
    "hrnet": 32,
    "naflexvit": 16,
    "qwen3_vit": 16,
    "tresnet": 4,
}
_LEAST_PX = {"inception_resnet_v2": 75, "inception_v3": 75, "inception_v4": 75}
"""Module -> the least height and width, where the last kernels would be larger than the maps."""


@cache
def names() -> list[str]:
    import timm

    return sorted({*timm.list_models(), *timm.list_pretrained()})


def info(name: str) -> ModelInfo:
    config = _config(name)
    num_classes = int(config.get("num_classes") or 0)
    return ModelInfo(
        name=f"timm/{name}",
        library="timm",
        task="image",
        input_spec=_input_spec(config),
        num_classes=num_classes,
        labels=imagenet_labels() if num_classes == 1000 else None,
        default_weights=config.get("hf_hub_id") or config.get("url") or None,
    )


def build(name: str, num_classes: int | None) -> nn.Module:
    import timm

    head: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    return timm.create_model(name, pretrained=False, **head)


def build_default(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=True)


def key_map(name: str) -> KeyMap:
    return dict


def sizes(model: nn.Module, spec: InputSpec) -> SizeRule:
    """The sizes that ``model`` takes: by its patch embedding, timm's own settings, and the tables above."""
    from timm.layers import PatchEmbed

    embed = getattr(model, "patch_embed", None)
    if isinstance(embed, PatchEmbed) and embed.img_size is not None and not embed.strict_img_size:
        return ANY_SIZE if embed.dynamic_img_pad else SizeRule(multiple_of_px=tuple(embed.patch_size))
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    module = type(model).__module__.rpartition(".")[2]
    name = str(config.get("architecture", ""))
    if "halo" in name or name.startswith(("maxvit", "maxxvit")):  # windows that follow from the size
        return SizeRule(multiple_of_px=spec.size_px)
    if config.get("fixed_input_size") and module not in _ANY_SIZE:
        return SizeRule(only_px=spec.size_px)
    if module in _LEAST_PX:
        return SizeRule(least_px=_LEAST_PX[module])
    multiple = _MULTIPLES_PX.get(module)
    return ANY_SIZE if multiple is None else SizeRule(multiple_of_px=(multiple, multiple))


def _config(name: str) -> dict[str, Any]:
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(name, allow_unregistered=True)
    return {} if config is None else config.to_dict()


def _input_spec(config: dict[str, Any]) -> InputSpec:
    """timm's own data settings: the shorter side is ``size / crop_pct`` before the crop, or squashed to the size.

    Differs from timm for the few models with ``crop_pct`` above 1: no black border, the picture fills the input.
    """
    from timm.data import resolve_data_config

    data = resolve_data_config(pretrained_cfg=config)
    _, height, width = data["input_size"]
    squash = data["crop_mode"] == "squash" or height != width
    return InputSpec(
        size_px=(height, width),
        resize_px=None if squash else math.floor(min(height, width) / min(data["crop_pct"], 1.0)),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
    )
