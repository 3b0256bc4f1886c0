"""Whether two values are the same to the bit: tensors, numbers, and structures of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def same(a: Any, b: Any) -> bool:
    """The same structure, types, shapes and values; NaN is the same as NaN."""
    leaves_a, spec_a = pytree.tree_flatten(a)
    leaves_b, spec_b = pytree.tree_flatten(b)
    return spec_a == spec_b and all(map(same_leaf, leaves_a, leaves_b))


def same_leaf(a: Any, b: Any) -> bool:
    """The same value of the same type; what cannot be compared is the same only if it is one object."""
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and same_tensor(a, b)
    if type(a) is not type(b):
        return False
    try:
        if isinstance(a, np.ndarray):
            return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        return bool(a == b) or (a != a and b != b)
    except Exception:
        return False


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """The same shape, type, device, layout and values; NaN is the same as NaN."""
    if a.is_nested or b.is_nested:
        parts = [list(t.unbind()) if t.is_nested else [] for t in (a, b)]
        return len(parts[0]) == len(parts[1]) and all(map(same_tensor, *parts))
    if (a.shape, a.dtype, a.device, a.layout) != (b.shape, b.dtype, b.device, b.layout):
        return False
    if a.device.type == "meta":
        return True
    try:
        if torch.equal(a, b):
            return True
        if not (a.is_floating_point() or a.is_complex()):
            return False
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    except (RuntimeError, NotImplementedError):  # sparse and quantised tensors
        return torch.equal(a.to_dense(), b.to_dense()) if a.layout is not torch.strided else False
