"""Periods of multi-rate clocks from measured feature change: what changes slowly is computed seldom.

    change of stage j     c_j = mean over the ticks t of |h_j(t) - h_j(t - 1)| / |h_j(t - 1)|       (Euclidean lengths)
    its longest period    p_j = 1 + floor(tolerance / c_j): a value held for p ticks is at most p - 1 ticks old, by
                          when it is wrong by about (p - 1) c_j of its length, which ``tolerance`` bounds
    a power of two        rounded down, where wanted; at most ``max_period``
    growing with depth    p_j = min(p_j, p_(j+1), ..., p_K): earlier stages tick more often than they would have to

The rule is ours: Massively Parallel Video Networks (ECCV 2018) has clocks that slow down with depth, set by hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sidestream.circuit.stage import Stages
from sidestream.circuit.wire import Circuit
from sidestream.circuit.wiring import sequential
from sidestream.engine.unroll import unroll
from sidestream.errors import InputError


@torch.no_grad()
def feature_change(circuit: Circuit | Stages, clip_BTCHW: Tensor) -> tuple[float, ...]:
    """c_j of every stage: mean over ticks and clips, all outputs of a stage taken as one vector.

    ``Stages`` are measured in a row on the same frame. A stage that wrote fewer than two values has no change: NaN.
    """
    if isinstance(circuit, Stages):
        circuit = sequential(circuit)
    found = []
    for trace in unroll(circuit, clip_BTCHW, drain=False, traced=True).traces:
        rows = [y.flatten(2).double() for y in trace.outputs if y.is_floating_point()]
        values_BTN = torch.cat(rows, 2) if rows else torch.zeros(1, 0, 1)
        steps = (values_BTN[:, 1:] - values_BTN[:, :-1]).norm(dim=2)
        lengths = values_BTN[:, :-1].norm(dim=2)
        found.append(float((steps / lengths.clamp(min=torch.finfo(torch.float64).tiny)).mean()))
    return tuple(found)


def periods_from_change(
    circuit: Circuit | Stages,
    clip_BTCHW: Tensor,
    *,
    tolerance: float = 0.2,
    max_period: int = 8,
    powers_of_two: bool = True,
) -> tuple[int, ...]:
    """Periods for ``with_periods``, from how much each stage's output changes from tick to tick on real frames."""
    return choose_periods(
        feature_change(circuit, clip_BTCHW), tolerance=tolerance, max_period=max_period, powers_of_two=powers_of_two
    )


def choose_periods(
    changes: Sequence[float], *, tolerance: float = 0.2, max_period: int = 8, powers_of_two: bool = True
) -> tuple[int, ...]:
    """The rule above, on c_1 ... c_K. Raises InputError for a tolerance below 0, or no change measured."""
    if not tolerance >= 0 or max_period < 1:
        raise InputError(f"{tolerance = }, {max_period = }; give 0 or more, and 1 or more")
    if any(math.isnan(c) for c in changes):
        raise InputError(f"the changes are {tuple(changes)}; measure them on a longer clip")
    longest = [max_period if c * max_period <= tolerance else min(max_period, 1 + int(tolerance / c)) for c in changes]
    if powers_of_two:
        longest = [1 << (p.bit_length() - 1) for p in longest]
    return tuple(min(longest[n:]) for n in range(len(longest)))
