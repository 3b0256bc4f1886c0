"""One stream in a pool of workers: its machine, its feed, and what is in flight."""

from __future__ import annotations

import time
from collections import deque

from sidestream.circuit.ages import lags_of
from sidestream.circuit.stage import SOURCE
from sidestream.engine.executors.in_flight import LiveLimit, num_needed
from sidestream.engine.feed import Feed
from sidestream.engine.tick import Machine

STOP_GRACE_SECONDS = 1.0
"""How long a stopped run waits for a source that is stuck before it ends without it."""


class Lane:
    """One stream in a pool."""

    def __init__(self, machine: Machine, feed: Feed, limit: int | LiveLimit) -> None:
        self.machine, self.feed = machine, feed
        self.live = limit if isinstance(limit, LiveLimit) else None
        self.most = limit.most if isinstance(limit, LiveLimit) else limit
        self.number = 0
        """Its place in the pool."""
        self.least = num_needed(machine)
        self.queued: set[int] = set()  # cells that are ready or at work
        self.num_in_flight = 0
        self.num_unread = 0  # answers that nobody has taken yet
        self.has_fed_end = False
        self.asked_feed_at: float | None = None  # since when the feed is being asked for its next tick
        self.arrivals: deque[float] = deque()  # of the frames in flight, oldest first
        self.num_left = 0  # frames that are in flight no more
        self.lags = lags_of(machine.circuit)
        self.readers = readers_of(machine)
        self.reads_sink = {w.source for w in machine.circuit.wires_into(machine.circuit.sink)}

    @property
    def limit(self) -> int:
        """Frames that may be inside at once."""
        return self.most if self.live is None else self.live.now

    @property
    def num_ahead(self) -> int:
        """Frames inside beyond those that the next answer needs."""
        return max(0, self.num_in_flight - self.least + 1)

    @property
    def is_full(self) -> bool:
        """Whether its next frame has to wait: for answers, or for who reads them."""
        return self.num_in_flight >= self.limit or self.num_unread >= self.most + 1

    @property
    def is_stuck(self) -> bool:
        """It was stopped, but its source neither brings a frame nor ends."""
        asked_at = self.asked_feed_at
        is_waiting = asked_at is not None and time.monotonic() - asked_at > STOP_GRACE_SECONDS
        return self.feed.is_stopped and not self.has_fed_end and is_waiting

    def arrival_of(self, position: int) -> float:
        """When the frame that a cell would work on came."""
        place = min(max(position - self.num_left, 0), len(self.arrivals) - 1)
        return self.arrivals[place] if self.arrivals else 0.0


def readers_of(machine: Machine) -> list[tuple[int, ...]]:
    """For the source and every stage, the stages that its wires (and lines back) lead to."""
    circuit = machine.circuit
    readers: list[set[int]] = [set() for _ in range(circuit.num_stages + 1)]
    for wire in circuit.wires:
        if wire.target != circuit.sink:
            readers[wire.source].add(wire.target)
    for back in machine.rule.lines_back(circuit):
        readers[back.source].add(back.target)
    inputless = {n for n in range(1, circuit.num_stages + 1) if not circuit.wires_into(n)}
    readers[SOURCE] |= inputless
    return [tuple(sorted(r)) for r in readers]
