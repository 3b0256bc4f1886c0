"""Products of a stage's Jacobians and of their transposes, at one input, and the norms of these by power iteration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


class JacobiansAt:
    """A stage at one input, with products of its Jacobians and of their transposes. Part 0: input, 1: parameters."""

    def __init__(self, step: Callable[..., Any], parameters: Tensors, value: Tensor) -> None:
        given = value.detach().requires_grad_()
        with torch.enable_grad():
            self.out = step((given,), None)[0][0]
        self.wanted = ((given,), parameters)
        self._pulled: dict[int, tuple[Tensor, Tensors]] = {}

    def pull(self, cotangent: Tensor) -> tuple[Tensors, Tensors]:
        """(J^T c, P^T c)."""
        flat = torch.autograd.grad(
            self.out, [*self.wanted[0], *self.wanted[1]], cotangent, retain_graph=True, materialize_grads=True
        )
        return flat[:1], flat[1:]

    def push(self, tangent: Tensors, part: int) -> Tensor:
        """J w or P w: J^T v is linear in v, and its derivative in v, pulled back from w, is J w."""
        if part not in self._pulled:
            v = torch.ones_like(self.out).requires_grad_()
            pulled = torch.autograd.grad(
                self.out, self.wanted[part], v, create_graph=True, retain_graph=True, materialize_grads=True
            )
            self._pulled[part] = v, pulled
        v, pulled = self._pulled[part]
        reached = [(p, w) for p, w in zip(pulled, tangent, strict=True) if p.requires_grad]
        if not reached:
            return torch.zeros_like(self.out)
        outputs, seeds = zip(*reached, strict=True)
        return torch.autograd.grad(outputs, v, seeds, retain_graph=True, materialize_grads=True)[0]

    def gain(self, start: Tensor, part: int, num_iterations: int) -> float:
        """Power iteration for the norm of J^T or P^T; never less than what it does to ``start``."""
        largest, direction = 0.0, start
        for remaining in range(num_iterations, -1, -1):
            length = norm_of((direction,))
            if not length or not self.wanted[part]:
                break
            pulled = self.pull(direction / length)[part]
            largest = max(largest, norm_of(pulled))
            if remaining:
                direction = self.push(pulled, part)
        return largest


def norm_of(tensors: Tensors) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))
