"""What the layers of a chain cost: seconds of a step that answers, measured; or parameters, or given numbers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from sidestream.circuit.measure import Costs, given_costs, one_thread
from sidestream.circuit.stage import NOTHING, State
from sidestream.errors import CutError
from sidestream.nn.steppable import Steppable

ENOUGH_SECONDS, SEARCH_SECONDS = 0.5, 2.0
"""Time for measuring a layer (a step that takes longer is run once), and for finding a step of it that answers."""


def seconds_of(layers: Iterable[Steppable], values: Sequence[Any], num_runs: int = 7) -> list[float]:
    """Seconds of a step of each layer on one thread: the least of ``num_runs`` after a warm-up, fewer when slow."""
    least = []
    with one_thread(), torch.no_grad():
        for layer, value in zip(layers, values):
            state, seconds = _answering_state(layer, value)
            times = [seconds]
            while len(times) <= num_runs and sum(times) < ENOUGH_SECONDS:
                start = time.perf_counter()
                layer.step(value, state)
                times.append(time.perf_counter() - start)
            least.append(min(times[1:] or times))
    return least


def _answering_state(layer: Steppable, value: Any) -> tuple[State, float]:
    """A state in which the next step answers, and how long that step took for the first time.

    A step that swallows its frame costs next to nothing. Where ``SEARCH_SECONDS`` bring no answer (a slow layer that
    looks far ahead), it is the slowest step by then.
    """
    state, slowest = layer.init_state(value), (None, -1.0)
    began = time.perf_counter()
    while True:
        start = time.perf_counter()
        answer, next_state = layer.step(value, state)
        now = time.perf_counter()
        if answer is not NOTHING:
            return state, now - start
        if now - start > slowest[1]:
            slowest = (state, now - start)
        if now - began > SEARCH_SECONDS:
            return slowest
        state = next_state


def weights_of(layers: dict[str, Steppable], costs: Costs) -> list[float]:
    """What the layers count for where nothing is measured. Raises CutError for a measure that is unknown."""
    if not isinstance(costs, str):
        return given_costs(costs, len(layers))
    if costs == "parameters":
        return [float(sum(p.numel() for p in layer.parameters())) for layer in layers.values()]
    if costs == "uniform":
        return [1.0] * len(layers)
    raise CutError(f"costs={costs!r} is unknown for a Chain; choose measured, parameters or uniform, or give numbers")
