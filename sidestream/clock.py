"""Where time comes from: a wall clock for work, a manual one that tests hold still."""

from __future__ import annotations

import threading
import time
from typing import Protocol


class Clock(Protocol):
    """Seconds since the clock's own start, never running backwards."""

    def now(self) -> float: ...

    def sleep_until(self, at_seconds: float) -> None: ...


class WallClock:
    """Real time, monotonic, zero when the object is made."""

    def __init__(self) -> None:
        self._start_seconds = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._start_seconds

    def sleep_until(self, at_seconds: float) -> None:
        """Return at ``at_seconds`` on this clock, or at once when that is past."""
        while (wait_seconds := at_seconds - self.now()) > 0:
            time.sleep(wait_seconds)


class ManualClock:
    """Time that moves only when told: ``sleep_until`` jumps there. For tests and for simulated replays."""

    def __init__(self, start_seconds: float = 0.0) -> None:
        self._now_seconds = start_seconds
        self._lock = threading.Lock()

    def now(self) -> float:
        with self._lock:
            return self._now_seconds

    def sleep_until(self, at_seconds: float) -> None:
        with self._lock:
            self._now_seconds = max(self._now_seconds, at_seconds)

    def advance(self, by_seconds: float) -> None:
        with self._lock:
            self._now_seconds += by_seconds


WALL = WallClock()
"""The process's own clock: the default of ``stream`` and ``run``, so that their times compare."""
