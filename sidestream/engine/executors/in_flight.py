"""How many frames an executor lets in at once: enough for full speed, and on a live source none that only waits."""

from __future__ import annotations

import math
from collections import deque

from sidestream.circuit.ages import information_latency_ticks, look_ahead_ticks
from sidestream.engine.tick import Cell, Machine

NUM_TIMES, NUM_KNOWN, ROUNDING = 7, 3, 1e-6
"""Of each stage its last times are kept, and so many must be known."""


def limit_in_flight(machine: Machine, num_workers: int, max_in_flight: int | None, *, is_live: bool) -> int:
    """The most frames inside at once; an answer that needs newer frames than its own gets them."""
    if max_in_flight is None:
        max_in_flight = num_workers if is_live else num_workers + 1
    wanted = max_in_flight + look_ahead_ticks(machine.circuit)
    if machine.rule.goes_back:  # a stage may wait for one that reads newer frames
        return machine.latency + 1
    return max(num_needed(machine), min(machine.latency + 1, wanted))


class LiveLimit:
    """``limit_in_flight`` of a live source, lowered to what full speed needs as the times of the stages become known.

    Where the camera is faster than the slowest stage, further frames would queue inside and grow old. The answers come
    as often as the busiest worker allows, every max(slowest stage, all stages / workers) seconds, and a frame spends
    the time of all stages inside; so full speed needs the quotient of the two (Little's law). Times vary: for the first
    a stage counts with the median of its last times, for the second with the longest but one, as a single hiccup is not
    to change anything.
    """

    def __init__(self, machine: Machine, num_workers: int, max_in_flight: int | None) -> None:
        self.most = limit_in_flight(machine, num_workers, max_in_flight, is_live=True)
        circuit = machine.circuit
        self._least, self._num_workers = num_needed(machine), num_workers
        self._more = self._least - 1
        has_clocks = any(p > 1 for p in circuit.periods) or any(s.period_ticks > 1 for s in circuit.stages)
        self._is_fixed = max_in_flight is not None or machine.rule.goes_back or has_clocks
        self._times: list[deque[float]] = [deque(maxlen=NUM_TIMES) for _ in range(circuit.num_stages)]
        self.now = self.most

    def book(self, fired: Cell, seconds: float) -> bool:
        """A stage has worked for so long, in any unit; whether there is more room now. Ticks in which nothing has
        reached it yet do not count."""
        if self._is_fixed or fired.tick <= fired.lag:
            return False
        self._times[fired.number - 1].append(seconds)
        if min(map(len, self._times)) < NUM_KNOWN:
            return False
        ordered = [sorted(times) for times in self._times]
        usual = [times[len(times) // 2] for times in ordered]
        before = self.now
        if (every := max(max(usual), sum(usual) / self._num_workers)) > 0:
            frames = math.ceil(sum(times[-2] for times in ordered) / every - ROUNDING)
            self.now = max(self._least, min(self.most, self._more + frames))
        return self.now > before


def num_needed(machine: Machine) -> int:
    """Frames without which there is no answer."""
    return machine.latency - information_latency_ticks(machine.circuit) + 1
