"""A refusal: bfloat16 on a CPU, where a convolution's kernel is longer in time than what it reads.

For a ``conv3d`` in bfloat16 that pads in time, and whose input is shorter than its kernel, torch 2.15 (oneDNN) gives
weight gradients that are wrong or NaN, often without a word; in float32, and where the zeros are padded before the
convolution, they are right. Measured with 2 frames under a kernel of 3: NaN; 2 under 5: a relative error of 0.7.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, device, nn

from sidestream.errors import InputError


@contextmanager
def no_short_convolutions(net: nn.Module, precision: str, on: device) -> Iterator[None]:
    """While inside, ``net`` refuses such clips with ``InputError``, if it is to be trained in bfloat16 on a CPU."""
    if precision != "bf16" or on.type != "cpu":
        yield
        return
    layers = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Conv3d)]
    hooks = [m.register_forward_pre_hook(partial(_check, name)) for name, m in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check(name: str, conv: nn.Conv3d, given: tuple[Any, ...]) -> None:
    x = given[0]
    pads = conv.padding == "same" or (not isinstance(conv.padding, str) and conv.padding[0] > 0)
    if isinstance(x, Tensor) and pads and 1 < x.shape[-3] < conv.kernel_size[0]:
        raise InputError(
            f"layer {name!r} reads {x.shape[-3]} steps in time under a kernel of {conv.kernel_size[0]}: torch's "
            "gradients of that are wrong in bfloat16 on a CPU; give longer clips, or train with precision='no'"
        )
