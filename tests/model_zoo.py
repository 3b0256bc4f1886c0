"""The models that tests go through: all of our own, one of each module of torchvision and timm; sizes and lengths."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from sidestream.models import create_model, list_models, model_info
from sidestream.models.clip_border import ClipBorder
from sidestream.models.guard import SizeRule
from sidestream.types import InputSpec

OWN = [name for name in list_models() if "/" not in name]
"""Sidestream's own."""
TORCHVISION = list_models("torchvision/*")
HUGE = 150_000_000
"""Parameters; larger models of the other libraries are not made, but for their layout (``on_meta``)."""
FIXED_SIZE = {"videomae": 224, "vivit": 224, "frame_vit": 224}
"""Beginning of a name -> the one size it takes; it refuses others."""


@cache
def spec_of(name: str) -> InputSpec:
    return model_info(name).input_spec


def sizes_px(name: str) -> list[tuple[int, int]]:
    fixed = [size for start, size in FIXED_SIZE.items() if name.startswith(start)]
    return [(fixed[0], fixed[0])] if fixed else [(64, 64), (96, 128)]


def lengths(name: str) -> list[int]:
    spec = spec_of(name)
    if spec.min_frames is None:
        return [spec.num_frames]
    return [spec.min_frames, max(spec.min_frames + 3, 9)]


@torch.no_grad()
def lively(model: nn.Module, given: Tensor) -> nn.Module:
    """Fresh weights that start at zero would hide what they multiply, fresh batch norms let signals fade or grow."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None  # the statistics of what it has seen
        norm.train()
    if norms:
        model(torch.cat([given, given.flip(-1) * 0.7]))
    return model.eval()


def one_per_module(names: list[str], module_of: Callable[[str], str]) -> list[str]:
    """The smallest of each module, by what the names say."""
    found: dict[str, str] = {}
    for name in sorted(names, key=lambda n: (not any(w in n for w in ("tiny", "small", "400mf")), len(n), n)):
        found.setdefault(module_of(name), name)
    return sorted(found.values())


def module_of_torchvision(name: str) -> str:
    from torchvision.models import get_model_builder

    return get_model_builder(name.partition("/")[2]).__module__


@cache
def timm_names() -> list[str]:
    """All that timm can make, without the tags of weights."""
    import timm

    return [f"timm/{name}" for name in timm.list_models()]


def module_of_timm(name: str) -> str:
    import timm

    return timm.model_entrypoint(name.partition("/")[2]).__module__


TIMM_FEW = one_per_module(timm_names(), module_of_timm)
FOREIGN = [*one_per_module(TORCHVISION, module_of_torchvision), *TIMM_FEW]
"""One of each module of torchvision and timm."""


def rule_of(model: nn.Module) -> SizeRule:
    if isinstance(model, ClipBorder):
        return model.sizes
    (hook,) = model._forward_pre_hooks.values()
    return hook.args[1]


def on_meta(name: str) -> nn.Module:
    """Without memory for its weights, where it can be made so."""
    try:
        with torch.device("meta"):
            return create_model(name)
    except (NotImplementedError, RuntimeError):  # some read numbers while they are made
        return create_model(name)


def clip_of(spec: InputSpec, num_frames: int, size_px: tuple[int, int], batch: int) -> Tensor:
    frames = () if spec.layout == "BCHW" else (num_frames,)
    return torch.randn(batch, *frames, 3, *size_px, generator=torch.Generator().manual_seed(1))
