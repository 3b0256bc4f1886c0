"""Image models of timm by name; a tag chooses among its weights: ``timm/vit_tiny_patch16_224.augreg_in21k``."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from torch import nn

from sidestream.models.info import ModelInfo
from sidestream.models.labels import imagenet_labels
from sidestream.models.weights import KeyMap
from sidestream.types import InputSpec


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
