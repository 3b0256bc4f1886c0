"""How far eager's own answer moves when every operation in it is rounded a little differently.

A runtime sums in another order, so it may differ from eager by rounding, and by much more than rounding where the
net itself makes much of little: a softmax of large numbers, a norm of a constant, an argmax of two near equals. How
much more is asked of eager. The result of every operation is multiplied by 1 + 1e-6 * noise. Sums, products of
matrices, softmax and norms lose more than that where terms cancel: what they read is multiplied so as well, and their
results are moved by 1e-7 of the largest. Then the answers are compared. The inputs themselves are not moved: the
runtime gets the same. An answer that so moves proves nothing where it moves.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sidestream.circuit.stage import Values

NUM_DRAWS = 4
SIZE = {"float32": 1e-6, "bfloat16": 4e-3}
"""Relative size of the noise, by the precision of the arithmetic."""
OF_THE_LARGEST = 0.1
"""What sums are moved by, in parts of that size and of their largest value."""
SUMS = re.compile("conv|mm|mv|dot|linear|lstm|mkldnn|sum|mean|norm|std|var|softmax|scaled_dot_product")


class Rounded(TorchDispatchMode):
    """Under it every operation's floating-point result is a little off. Views and writes in place are left alone."""

    def __init__(self, seed: int, size: float) -> None:
        super().__init__()
        self._rng = torch.Generator().manual_seed(seed)
        self._size = size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(result.alias_info is not None for result in func._schema.returns):
            return func(*args, **(kwargs or {}))
        is_sum = SUMS.search(func._schema.name) is not None
        if is_sum and args and isinstance(args[0], Tensor):
            args = (self.moved(args[0]), *args[1:])
        made = func(*args, **(kwargs or {}))
        return pytree.tree_map_only(Tensor, lambda value: self.moved(value, is_sum), made)

    def moved(self, value: Tensor, is_sum: bool = False) -> Tensor:
        """``value`` with noise, in the same memory layout; zeros stay zeros unless they are sums."""
        if not value.is_floating_point() or value.numel() == 0 or value.device.type != "cpu":
            return value
        size = max(self._size, torch.finfo(value.dtype).eps)
        noisy = value * torch.empty_like(value).uniform_(1 - size, 1 + size, generator=self._rng)
        if is_sum:
            largest = float(largest_of(value)) * size * OF_THE_LARGEST
            noisy += torch.empty_like(value).uniform_(-largest, largest, generator=self._rng)
        limits = torch.finfo(value.dtype)
        return torch.where(value.isfinite(), noisy.clamp(limits.min, limits.max), value)


def deviations(run: Callable[[Values], Values], inputs: Values, precision: str, outputs: Values) -> list[Tensor | None]:
    """For each of ``outputs``, what ``run`` answers to ``inputs``: how far it moves, element by element.

    None for outputs that are no tensors. Infinite where a whole number, a truth value, NaN or infinity changes.
    """
    moved: list[Tensor | None] = [distance(v, v) if isinstance(v, Tensor) else None for v in outputs]
    for seed in range(NUM_DRAWS):
        rounded = Rounded(seed, SIZE[precision])
        given = tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)
        with rounded:
            answers = run(given)
        for n, most in enumerate(moved):
            if most is not None:
                moved[n] = torch.maximum(most, distance(answers[n], outputs[n]))
    return moved


def distance(answer: Tensor, expected: Tensor) -> Tensor:
    """How far apart two tensors of one shape are, element by element.

    Zero where both are equal, both NaN or the same infinity. Infinite where only one of them is NaN or infinite, and
    for whole numbers and truth values that differ.
    """
    if not expected.is_floating_point():
        return torch.zeros(expected.shape).masked_fill_(answer != expected, torch.inf)
    if expected.dtype != torch.float64:
        answer, expected = answer.float(), expected.float()
    same = (answer == expected) | (answer.isnan() & expected.isnan())
    apart = (answer - expected).abs_()
    return apart.masked_fill_(apart.isnan(), torch.inf).masked_fill_(same, 0.0).float()


def largest_of(value: Tensor) -> Tensor:
    """The largest absolute value that is finite, or zero."""
    return torch.where(value.isfinite(), value, 0.0).abs().max()
