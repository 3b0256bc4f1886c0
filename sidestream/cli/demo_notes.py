"""Why the demo's figures may stay below its forecast: other programs at work, and a clip that comes no faster."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

LEAST_CORES = 0.25
"""Other programs that use less than this are not worth a line."""


@dataclass(frozen=True)
class CpuTimes:
    """Seconds of work up to a moment, on the cores that this process may use."""

    at_seconds: float
    all_seconds: float
    own_seconds: float

    @classmethod
    def now(cls) -> CpuTimes | None:
        """None where the system does not tell (it is read from /proc/stat)."""
        try:
            text = Path("/proc/stat").read_text(encoding="utf-8")
            busy_seconds = busy_ticks(text, os.sched_getaffinity(0)) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, AttributeError):
            return None
        return cls(time.perf_counter(), busy_seconds, time.process_time()) if busy_seconds > 0 else None


def busy_ticks(stat: str, cores: Collection[int]) -> int:
    """User, nice, system, irq and softirq time of the ``cores``, from the lines ``cpuN`` of /proc/stat."""
    total = 0
    for line in stat.splitlines():
        name, _, rest = line.partition(" ")
        if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in cores:
            user, nice, system, _, _, irq, softirq = (int(ticks) for ticks in rest.split()[:7])
            total += user + nice + system + irq + softirq
    return total


def cores_of_others(before: CpuTimes | None, after: CpuTimes | None) -> float:
    """How many cores other programs used in between, on average; 0 where it is not known."""
    if before is None or after is None or after.at_seconds <= before.at_seconds:
        return 0.0
    others = (after.all_seconds - before.all_seconds) - (after.own_seconds - before.own_seconds)
    return max(0.0, others / (after.at_seconds - before.at_seconds))


def notes(
    forecast_rate: float | None, given_rate: float, *, others: float, num_cores: int, num_workers: int
) -> list[str]:
    """Lines for under the table; none where neither holds.

    ``forecast_rate``, ``given_rate``: frames/s that were predicted, and that the source gave. ``others``: cores that
    other programs use of the ``num_cores`` that the ``num_workers`` share with them.
    """
    found = []
    if others >= LEAST_CORES and others + num_workers >= num_cores + LEAST_CORES:
        found.append(f"other programs use {others:.1f} of {num_cores} cores: the forecast does not hold")
    if forecast_rate is not None and 0 < given_rate < forecast_rate:
        found.append(f"the clip came at {given_rate:.1f} frames/s: no more than that can be answered")
    return found
