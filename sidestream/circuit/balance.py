"""How many stages, and where to cut: exact min-max contiguous partitions. Pure functions of plain numbers.

costs      3   1   4   1   5   9   2   6        num_parts = 3
parts     [3   1   4   1] [5   9] [2   6]       largest part 14: no other cut into three is lower
boundaries               4       6
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate

import numpy as np

from sidestream.errors import CutError

BYTES_SHARE = 0.1
"""Crossing nothing at all would be worth this share of evenness: bytes decide between places close to each other."""


def partition(
    costs: Sequence[float],
    num_parts: int,
    *,
    crossings: Sequence[float] | None = None,
    slack: float = 0.02,
) -> tuple[int, ...]:
    """Boundaries (first item of part 2, 3, ...) of the contiguous partition whose dearest part is cheapest.

    Ties go to the most even partition (least sum of squared part costs), then to the smallest boundaries.
    With ``crossings`` (``crossings[i]``: the price of a cut before item i, bytes say) all partitions whose dearest
    part is within ``slack`` (a share) of the optimum are candidates, and the lowest

        squares / squares of the most even candidate + BYTES_SHARE * crossings / crossings of that candidate

    wins. No part is empty. Raises CutError when there are fewer items than parts, or a cost is negative or not finite.
    """
    prefix = _checked_prefix(costs, num_parts)
    limit = _lowest_limit(prefix, num_parts)
    if crossings is None:
        return _cheapest_within(prefix, num_parts, limit, np.zeros(len(costs)))
    limit, prices = limit * (1.0 + slack), np.asarray(crossings, dtype=np.float64)
    most_even = _cheapest_within(prefix, num_parts, limit, np.zeros(len(costs)))
    parts = np.diff(prefix[[0, *most_even, len(costs)]])
    squares, price = float((parts**2).sum()), float(prices[list(most_even)].sum())
    if squares == 0.0 or price == 0.0:
        return most_even
    return _cheapest_within(prefix, num_parts, limit, prices * (BYTES_SHARE * squares / price))


def largest_part(costs: Sequence[float], num_parts: int) -> float:
    """Cost of the dearest part of the best contiguous partition into ``num_parts``."""
    return _lowest_limit(_checked_prefix(costs, num_parts), num_parts)


def auto_num_stages(costs: Sequence[float], num_workers: int) -> int:
    """The smallest number of stages that keeps ``num_workers`` busy, at most four per worker.

    Stages of a tick are handed to whichever worker is free, so a tick takes at most total / W + the largest
    stage (Graham 1966). Asking for a largest stage of half a worker's share, total / (2 W), bounds the loss;
    more stages would only add latency and registers. Where a single item is dearer than that, the number
    from which on cutting helps no more. One worker runs nothing in parallel: one stage.
    """
    if num_workers < 1:
        raise CutError(f"cannot plan for {num_workers = }; it must be at least 1")
    if num_workers == 1:
        return 1
    most = min(4 * num_workers, len(costs))
    largest = [largest_part(costs, n) for n in range(1, most + 1)]
    wanted = max(sum(costs) / (2 * num_workers), largest[-1])
    return next(n for n, cost in enumerate(largest, start=1) if cost <= wanted)


def _checked_prefix(costs: Sequence[float], num_parts: int) -> np.ndarray:
    if not 1 <= num_parts <= len(costs):
        raise CutError(f"cannot make {num_parts} parts of {len(costs)} items; ask for 1 to {len(costs)}")
    if not all(0.0 <= c < float("inf") for c in costs):
        raise CutError(f"costs must be finite and not negative, but they range from {min(costs)} to {max(costs)}")
    return np.asarray([0.0, *accumulate(float(c) for c in costs)])


def _fill(prefix: np.ndarray, num_parts: int, limit: float) -> tuple[list[int], float]:
    """Greedily filled parts under ``limit``: their ends, and the least limit under which any of them would grow."""
    N, ends, grows_at = len(prefix) - 1, [0], float("inf")
    while len(ends) <= num_parts and ends[-1] < N:
        start = ends[-1]
        end = start + int(np.searchsorted(prefix[start + 1 :] - prefix[start], limit, side="right"))
        if end < N:
            grows_at = min(grows_at, float(prefix[end + 1] - prefix[start]))
        ends.append(end)
    return ends[1:], grows_at


def _lowest_limit(prefix: np.ndarray, num_parts: int) -> float:
    """The exact optimum: bisection over limits that jumps from one real part cost to the next."""
    N, low, high = len(prefix) - 1, float(np.diff(prefix).max()), float(prefix[-1])
    limit = low
    while low < high:
        ends, grows_at = _fill(prefix, num_parts, limit)
        if ends[-1] == N:
            high = max(float(prefix[end] - prefix[start]) for start, end in zip([0, *ends], ends))
        else:
            low = grows_at
        middle = (low + high) / 2
        limit = middle if low < middle < high else low
    return high


def _cheapest_within(prefix: np.ndarray, num_parts: int, limit: float, crossings: np.ndarray) -> tuple[int, ...]:
    """Dynamic programme from the right: least sum of squared part costs and crossings, each part within ``limit``."""
    N = len(prefix) - 1
    price = np.full(N + 1, np.inf)
    price[N] = 0.0
    choice = np.zeros((num_parts + 1, N + 1), dtype=np.int64)
    for parts_left in range(1, num_parts + 1):
        new_price = np.full(N + 1, np.inf)
        is_first_part = parts_left == num_parts
        for start in [0] if is_first_part else range(num_parts - parts_left, N - parts_left + 1):
            part_costs = prefix[start + 1 :] - prefix[start]
            part_costs = part_costs[: int(np.searchsorted(part_costs, limit, side="right"))]
            prices = price[start + 1 : start + 1 + len(part_costs)] + part_costs**2
            if len(prices):
                best = int(np.argmin(prices))
                choice[parts_left, start] = start + 1 + best
                new_price[start] = prices[best] + (0.0 if is_first_part else crossings[start])
        price = new_price
    boundaries, start = [], 0
    for parts_left in range(num_parts, 1, -1):
        start = int(choice[parts_left, start])
        boundaries.append(start)
    return tuple(boundaries)


def balanced(
    costs: Sequence[float],
    crossings: Sequence[float],
    num_stages: int | str,
    *,
    num_workers: int,
    forbidden: Collection[int] = (),
) -> tuple[int, ...]:
    """Boundaries of ``num_stages`` (or "auto") balanced stages; no stage begins at an item that is ``forbidden``.

    Raises CutError when the items that must stay together leave fewer pieces than stages.
    """
    starts = [0, *(n for n in range(1, len(costs)) if n not in forbidden)]
    pieces = [sum(costs[start:end]) for start, end in zip(starts, [*starts[1:], len(costs)])]
    count = auto_num_stages(pieces, num_workers) if isinstance(num_stages, str) else num_stages
    if count > 1 and count > len(pieces):
        raise CutError(f"the model has {len(pieces)} places where a stage can begin, too few for {num_stages = }")
    if count == 1:
        return ()
    return tuple(starts[n] for n in partition(pieces, count, crossings=[crossings[n] for n in starts]))
