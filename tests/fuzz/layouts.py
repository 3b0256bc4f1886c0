"""Memory layouts: the same values contiguous, channels last, transposed, sliced out of more, or expanded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_OFFSET = 64
"""Elements before the first. So many that it is aligned as all tensors are: elsewhere products have other last bits."""


def _channels_last(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values.clone()


def _transposed(values: Tensor) -> Tensor:
    """The axes lie in memory in the opposite order."""
    order = list(reversed(range(values.dim())))
    return values.permute(order).contiguous().permute(order)


def _sliced(values: Tensor) -> Tensor:
    """Every second element of something larger, from somewhere in it on."""
    if values.dim() == 0:
        return values.clone()
    size = values.shape[-1]
    wide = values.new_zeros(*values.shape[:-1], 2 * size + _OFFSET + 3)
    wide[..., _OFFSET : _OFFSET + 2 * size : 2] = values
    return wide[..., _OFFSET : _OFFSET + 2 * size : 2]


def _offset(values: Tensor) -> Tensor:
    """Dense, but not at the start of its memory."""
    flat = torch.cat([values.new_zeros(_OFFSET), values.reshape(-1)])
    return flat[_OFFSET:].view(values.shape)


def _expanded(values: Tensor) -> Tensor:
    """One row that stands for all, along the last axis."""
    return values[..., :1].expand(values.shape) if values.dim() else values.clone()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values.clone(memory_format=torch.contiguous_format),
    "channels last": _channels_last,
    "transposed": _transposed,
    "sliced": _sliced,
    "offset": _offset,
    "expanded": _expanded,
}


def in_layout(values: Tensor, name: str) -> Tensor:
    """The values in a layout by name (expanded: the first column in place of all)."""
    return LAYOUTS[name](values)


def made_like(frame: Any, example: Any) -> Any:
    """A copy of the frame, every tensor in the strides of the example's, none sharing memory with another."""
    return pytree.tree_map(_made_like, frame, example)


def _made_like(value: Any, example: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if any(stride == 0 and size > 1 for stride, size in zip(example.stride(), example.shape)):
        return value.clone(memory_format=torch.contiguous_format)  # nothing can be written to such memory
    return torch.empty_strided(example.shape, example.stride(), dtype=value.dtype).copy_(value)
