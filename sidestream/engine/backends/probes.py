"""Inputs on which a converted stage is compared with eager: its example, and others of other ranges.

A frame is never the example. Where a runtime's operator differs, it often differs only in some range: far below
zero, at exact zeros, where a whole row is masked. So every tensor of the example is also tried as

    floating point   noise like it, scaled by 30, negated, zeros, halves (ties), moved far down, far up, one value
    masks (bool)     rows all True and all False, all True, all False, random
    whole numbers    permuted, all the least, all the greatest, random: never outside of the example's own range,
                     because they may be indices (those of 8 bits, which are pictures: of all their range)

Masks come first where there are any. All draws are from a generator of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sidestream.circuit.stage import Values

Vary = Callable[[Tensor, torch.Generator], Tensor]
SCALED = 30
"""Far enough for the tails of activations, near enough that a sound net stays finite."""
FAR = 100
"""How far all values are moved, in parts of the example's largest."""


def probes(example: Values) -> Iterator[tuple[str, Values]]:
    """``(kind, inputs)`` like ``example``: the same shapes and types, other values. Not the example itself."""
    rng = torch.Generator().manual_seed(20)
    tensors = [value for value in example if isinstance(value, Tensor) and value.numel() > 0]
    has_floats = any(value.is_floating_point() for value in tensors)
    has_masks = any(value.dtype == torch.bool for value in tensors)
    has_numbers = any(not value.is_floating_point() and value.dtype != torch.bool for value in tensors)
    floats = list(FLOATS) if has_floats else []
    if has_masks and floats:
        floats = ["noise like its example"] * (len(MASKS) - 1) + floats[1:]
    masks = list(MASKS) if has_masks else []
    numbers = list(NUMBERS) if has_numbers else []
    for n in range(max(len(floats), len(masks), len(numbers))):
        chosen = [kinds[n % len(kinds)] for kinds in (floats, masks, numbers) if kinds]
        yield ", ".join(chosen), tuple(_varied(value, chosen, rng) for value in example)


def layouts(example: Values) -> Iterator[tuple[str, Values]]:
    """``(kind, inputs)`` with the values of ``example`` in other places of memory."""
    if any(isinstance(value, Tensor) and value.dim() == 4 for value in example):
        yield "its example in channels-last memory", tuple(_channels_last(value) for value in example)
    if any(isinstance(value, Tensor) and value.numel() > 1 for value in example):
        yield "its example in strided memory", tuple(_strided(value) for value in example)


def _varied(value: object, chosen: list[str], rng: torch.Generator) -> object:
    if not isinstance(value, Tensor) or value.numel() == 0 or value.is_complex():
        return value
    kinds = FLOATS if value.is_floating_point() else MASKS if value.dtype == torch.bool else NUMBERS
    vary = next(kinds[kind] for kind in chosen if kind in kinds)
    made = vary(value, rng).to(value.dtype)
    if value.is_floating_point():  # what is infinite is a mark (no frame yet), and stays one
        made = torch.where(value.isfinite(), made, value)
    return torch.empty_like(value).copy_(made)  # in the example's memory layout


def _channels_last(value: object) -> object:
    if not isinstance(value, Tensor) or value.dim() != 4:
        return value
    return value.clone(memory_format=torch.channels_last)


def _strided(value: object) -> object:
    if not isinstance(value, Tensor) or value.numel() <= 1:
        return value
    return torch.stack([value, torch.zeros_like(value)], dim=-1)[..., 0]


def _noise(value: Tensor, rng: torch.Generator) -> Tensor:
    finite = _finite(value).float()
    spread = float(finite.std()) if finite.numel() > 1 else 0.0
    mean = float(finite.mean())
    noise = torch.randn(value.shape, generator=rng) * (spread or max(abs(mean), 1.0)) + mean
    return _bounded(noise, value)


def _scaled(value: Tensor, rng: torch.Generator) -> Tensor:
    return _bounded(value.double() * SCALED, value)


def _halves(value: Tensor, rng: torch.Generator) -> Tensor:
    """Steps of a half: many exact zeros, exact ties, and numbers between two whole ones."""
    steps = torch.randint(-5, 6, value.shape, generator=rng) / 2
    return steps * (torch.rand(value.shape, generator=rng) > 0.3) + 0.0  # without negative zeros


def _moved(by: int) -> Vary:
    return lambda value, rng: _bounded(value.double() + by * _size(value), value)


def _rows(value: Tensor, rng: torch.Generator) -> Tensor:
    """Along the last axis: one row all False, one all True, one random, and so on."""
    random = _coins(value, rng)
    if value.dim() == 0:
        return random
    rows = random.view(-1, value.shape[-1])
    rows[0::3], rows[1::3] = False, True
    return rows.view(value.shape)


def _coins(value: Tensor, rng: torch.Generator) -> Tensor:
    return torch.rand(value.shape, generator=rng) > 0.5


def _permuted(value: Tensor, rng: torch.Generator) -> Tensor:
    return value.reshape(-1)[torch.randperm(value.numel(), generator=rng)].view(value.shape)


def _within(value: Tensor, rng: torch.Generator) -> Tensor:
    least, greatest = _range(value)
    span = min(greatest - least + 1, 2**62)
    return torch.randint(0, span, value.shape, generator=rng) + least


def _range(value: Tensor) -> tuple[int, int]:
    """Least and greatest: the example's, or the type's where it has 8 bits (a picture, and no index)."""
    if value.dtype.itemsize == 1:
        return torch.iinfo(value.dtype).min, torch.iinfo(value.dtype).max
    return int(value.min()), int(value.max())


def _finite(value: Tensor) -> Tensor:
    finite = value[value.isfinite()]
    return finite if finite.numel() else torch.zeros(1)


def _size(value: Tensor) -> float:
    return float(_finite(value).abs().max()) or 1.0


def _bounded(made: Tensor, example: Tensor) -> Tensor:
    """Never made infinite by the type's range; what is infinite or NaN in the example stays so."""
    limits = torch.finfo(example.dtype)
    return torch.where(example.isfinite(), made.clamp(limits.min, limits.max).to(example.dtype), example)


FLOATS: dict[str, Vary] = {
    "noise like its example": _noise,
    "its example scaled by 30": _scaled,
    "its example negated": lambda value, rng: -value,
    "zeros": lambda value, rng: torch.zeros_like(value),
    "halves and whole numbers": _halves,
    "its example moved far down": _moved(-FAR),
    "its example moved far up": _moved(FAR),
    "one value everywhere": lambda value, rng: torch.full_like(value, _size(value)),
}
MASKS: dict[str, Vary] = {
    "masks with rows all True and rows all False": _rows,
    "masks all True": lambda value, rng: torch.ones_like(value),
    "masks all False": lambda value, rng: torch.zeros_like(value),
    "random masks": _coins,
}
NUMBERS: dict[str, Vary] = {
    "whole numbers permuted": _permuted,
    "whole numbers all the least": lambda value, rng: torch.full_like(value, _range(value)[0]),
    "whole numbers all the greatest": lambda value, rng: torch.full_like(value, _range(value)[1]),
    "random whole numbers": _within,
}
