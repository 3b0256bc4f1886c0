"""Numbers about a run and the machine it ran on."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def percentiles(values: Iterable[float], percents: Sequence[float] = (50, 95, 99)) -> tuple[float, ...]:
    """The given percentiles of ``values``, linear between neighbours; nan for each when there is no value."""
    ordered = sorted(values)
    return tuple(_percentile(ordered, percent) for percent in percents)


def _percentile(ordered: Sequence[float], percent: float) -> float:
    if not ordered:
        return math.nan
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def peak_rss_bytes() -> int:
    """The most memory that this process has held at once so far (resident), in bytes; 0 where no system call tells."""
    # VmHWM begins anew with each program, while getrusage carries the parent's peak over into a child.
    peak_kib = proc_kib(_read("/proc/self/status"), "VmHWM")
    if peak_kib is not None:
        return peak_kib * 1024
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def machine() -> dict[str, Any]:
    """What a record should say about where it was measured."""
    return {
        "cpu": cpu_name(),
        "num_cores": num_cores(),
        "memory_bytes": memory_bytes(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: package_version(name) for name in ("torch", "torchvision", "timm", "av", "onnxruntime", "openvino")},
    }


def cpu_name() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def num_cores() -> int:
    """Cores that this process may use: its affinity, cut by a container's limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = cpu_limit_cores(_read("/sys/fs/cgroup/cpu.max"))
    return cores if limit is None else max(1, min(cores, math.ceil(limit)))


def cpu_limit_cores(cpu_max: str) -> float | None:
    """Cores' worth of time that a container may use, from cgroup's ``cpu.max`` ("QUOTA PERIOD"); None: no limit."""
    quota, _, period = cpu_max.strip().partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def memory_bytes() -> int | None:
    """Memory that this process may use: the machine's, or a container's limit where that is less."""
    total_kib = proc_kib(_read("/proc/meminfo"), "MemTotal")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    known = [total_kib * 1024] if total_kib is not None else []
    return min([*known, int(limit)] if limit.isdigit() else known, default=None)


def package_version(name: str) -> str | None:
    """The installed version of a package, without importing it; None when it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def proc_kib(text: str, field: str) -> int | None:
    """The value of a line ``field:   123 kB`` of a file such as ``/proc/meminfo``; None when it is not there."""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
