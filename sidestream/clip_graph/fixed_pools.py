"""Poolings whose window is the whole clip: heads that were written for clips of one length, as pytorchvideo's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@contextmanager
def pools_over_all_time(model: nn.Module, clip: Tensor) -> Iterator[list[str]]:
    """Inside, average poolings that take in all frames of ``clip`` at once take the mean over all frames, however many
    there are; for a clip of this length that is the same. Yields their names: none where there is no such pooling."""
    whole: dict[str, nn.AvgPool3d] = {}
    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: _look(whole, name, m, args))
        for name, module in model.named_modules()
        if type(module) is nn.AvgPool3d
    ]
    try:
        with torch.no_grad():
            model(clip)
    finally:
        for handle in handles:
            handle.remove()
    try:
        for module in whole.values():
            module.forward = _over_all(module)  # type: ignore[method-assign]
        yield list(whole)
    finally:
        for module in whole.values():
            vars(module).pop("forward", None)


def _look(whole: dict[str, nn.AvgPool3d], name: str, module: nn.AvgPool3d, args: tuple[Any, ...]) -> None:
    frames, kernel, pad = args[0].shape[-3], _first(module.kernel_size), _first(module.padding)
    if frames == kernel > 1 and pad == 0 and module.divisor_override is None:
        whole[name] = module


def _over_all(pool: nn.AvgPool3d) -> Any:
    def forward(maps: Tensor) -> Tensor:
        kernel, stride, pad = ((1, *_rest(v)) for v in (pool.kernel_size, pool.stride, pool.padding))
        pooled = F.avg_pool3d(maps, kernel, stride, (0, *pad[1:]), pool.ceil_mode, pool.count_include_pad)
        return pooled.mean(-3, keepdim=True)

    return forward


def _first(value: int | tuple[int, int, int]) -> int:
    return value if isinstance(value, int) else value[0]


def _rest(value: int | tuple[int, int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value[1:]
