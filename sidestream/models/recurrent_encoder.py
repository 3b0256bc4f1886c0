"""An image model without its head, as the encoder of each frame: features, or the maps before they are pooled."""

from __future__ import annotations

from collections import OrderedDict
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from sidestream.errors import ModelError

PROBE_SIZE = (3, 224, 224)
"""Channels, height and width of the blank frame that an encoder is shown, unless timm says what it wants."""
_IN_ORDER = ("ResNet", "RegNet", "VGG", "AlexNet", "MobileNetV2", "MobileNetV3", "EfficientNet", "ConvNeXt")
"""Classes of torchvision whose children run one after the other, those before the pooling making maps."""
_POOL_OR_HEAD = ("avgpool", "classifier", "fc", "heads", "head")


def image_encoder(backbone: str | nn.Module, *, as_maps: bool) -> tuple[nn.Module, int]:
    """(encoder, its number of channels); the encoder takes frame_BCHW to (B, D), or ``as_maps`` to (B, C, H', W').

    ``backbone``: "torchvision/name", "timm/name", a bare name (looked up in this order), or a module that does this
    already. Models by name have random weights. Raises ``ModelError`` where there is none, or it gives something else.
    """
    encoder = _named(backbone, as_maps) if isinstance(backbone, str) else backbone
    return encoder, _num_channels(encoder, as_maps, backbone if isinstance(backbone, str) else type(backbone).__name__)


def _named(name: str, as_maps: bool) -> nn.Module:
    import timm
    from torchvision import models

    library, _, inner = name.rpartition("/")
    if library in ("", "torchvision") and inner in models.list_models(module=models):
        return _torchvision(inner, as_maps)
    if library in ("", "timm") and timm.is_model(inner.partition(".")[0]):
        pooling: dict[str, Any] = {"global_pool": ""} if as_maps else {}
        return timm.create_model(inner, pretrained=False, num_classes=0, **pooling)
    raise ModelError(
        f"there is no image model {name!r} in torchvision or timm; "
        "list them with 'sidestream models', or give a module as the backbone"
    )


def _torchvision(name: str, as_maps: bool) -> nn.Module:
    from sidestream.models import torchvision_zoo

    net = torchvision_zoo.build(name, None)
    return _maps_of(net, name) if as_maps else _features_of(net, name)


def _features_of(net: nn.Module, name: str) -> nn.Module:
    """``net`` with nothing in place of its last linear layer."""
    linears = [key for key, module in net.named_modules() if isinstance(module, nn.Linear)]
    last = linears[-1] if linears else ""
    if not last.startswith(_POOL_OR_HEAD):
        raise ModelError(f"torchvision's {name!r} has no linear layer at its end; take another backbone, as 'timm/...'")
    net.set_submodule(last, nn.Identity())
    return net


def _maps_of(net: nn.Module, name: str) -> nn.Module:
    """The children of ``net`` before its pooling, for nets that run their children in order."""
    if type(net).__name__ not in _IN_ORDER:
        raise ModelError(f"no maps are known of torchvision's {name!r}; take another backbone, as 'timm/{name}'")
    return nn.Sequential(OrderedDict(takewhile(lambda child: child[0] not in _POOL_OR_HEAD, net.named_children())))


def _num_channels(encoder: nn.Module, as_maps: bool, name: str) -> int:
    """Looks at one blank frame, in evaluation mode, so that no batch norm learns from it."""
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    like = next(encoder.parameters(), torch.zeros(()))
    size = getattr(encoder, "pretrained_cfg", {}).get("input_size", PROBE_SIZE)
    with torch.no_grad():
        answer = encoder(like.new_zeros(1, *size))
    for module, mode in modes:
        module.training = mode
    num_axes, wanted = (4, "maps (B, C, H, W)") if as_maps else (2, "features (B, D)")
    if not isinstance(answer, torch.Tensor) or answer.ndim != num_axes:
        shape = tuple(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
        raise ModelError(f"the backbone {name} gives {shape} for one frame; this cell reads {wanted}: take another one")
    return answer.shape[1]
