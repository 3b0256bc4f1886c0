"""The learning rate as a pure function of the update's number: nothing to save, nothing to restore."""

from __future__ import annotations

import math


def learning_rate(update: int, *, base: float, num_updates: int, num_warmup: int, schedule: str = "cosine") -> float:
    """The rate of update ``update`` (from 0): up in a straight line, then down half a cosine, or constant.

    base 1, 2 of 6 updates to warm up:    0.5  1.0  1.0  0.85  0.5  0.15
    """
    if update < num_warmup:
        return base * (update + 1) / num_warmup
    if schedule == "constant":
        return base
    way = (update - num_warmup) / max(1, num_updates - num_warmup)
    return base * 0.5 * (1.0 + math.cos(math.pi * min(way, 1.0)))
