"""The two conditions, and how much of the machine others used meanwhile."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

CONDITIONS = ("quiet", "busy")
_SPIN = "while True: pass"


@contextmanager
def condition(name: str) -> Iterator[list[psutil.Process]]:
    """ "busy": another process spins on one core, at normal priority, pinned nowhere. Gives the processes that spin."""
    if name == "quiet":
        yield []
        return
    process = subprocess.Popen([sys.executable, "-c", _SPIN])
    try:
        time.sleep(0.3)
        yield [psutil.Process(process.pid)]
    finally:
        process.kill()
        process.wait()


class OthersShare:
    """Processor time used by processes that are not this benchmark, in cores, since the object was made."""

    def __init__(self, spinners: list[psutil.Process]) -> None:
        self._ours = [psutil.Process(), *spinners]
        self._began = time.perf_counter(), self._busy_seconds(), self._our_seconds()

    def cores(self) -> float:
        at, busy, ours = self._began
        elapsed = time.perf_counter() - at
        return max(0.0, (self._busy_seconds() - busy) - (self._our_seconds() - ours)) / elapsed

    @staticmethod
    def _busy_seconds() -> float:
        times = psutil.cpu_times()._asdict()
        return sum(v for k, v in times.items() if k not in ("idle", "iowait", "guest", "guest_nice"))

    def _our_seconds(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._ours)
