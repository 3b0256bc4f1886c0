"""Energy counters of the machine: NVIDIA's driver for a GPU, RAPL for a processor; None where neither can be read.

RAPL counts the whole processor package, idle power and other programs included; NVIDIA's counter the whole board.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RAPL_ROOT = Path("/sys/class/powercap")


@dataclass(frozen=True)
class EnergyMeter:
    """A counter that only grows: the difference of two readings is the energy used between them."""

    source: str
    """Which counter, in words."""
    read_joules: Callable[[], float]


def energy_meter(device: str = "cpu", *, rapl_root: Path = RAPL_ROOT) -> EnergyMeter | None:
    """The counter for ``device`` ("cpu", "cuda", "cuda:1"); None where there is none that may be read."""
    return nvidia_meter(_gpu_index(device)) if device.startswith("cuda") else rapl_meter(rapl_root)


def rapl_meter(root: Path = RAPL_ROOT) -> EnergyMeter | None:
    """The sum over the processor packages under ``root`` (``intel-rapl:0``, ``intel-rapl:1``; AMD has the same names).

    Parts of a package (``intel-rapl:0:0``) are left out, since their package counts them. Counters that wrap round are
    followed, if read at least once per round (about a quarter of an hour at 250 W).
    """
    packages = [p for p in sorted(root.glob("intel-rapl:*")) if re.fullmatch(r"intel-rapl:\d+", p.name)]
    counters = [counter for p in packages if (counter := _RaplCounter.of(p)) is not None]
    if not counters:
        return None
    names = ", ".join(counter.name for counter in counters)
    return EnergyMeter(f"RAPL ({names})", lambda: sum(counter.read_joules() for counter in counters))


class _RaplCounter:
    """One package's counter, made to grow for ever."""

    def __init__(self, folder: Path, name: str, range_uj: int) -> None:
        self.name = name
        self._file, self._range_uj = folder / "energy_uj", range_uj
        self._last_uj, self._rounds = int(self._file.read_text()), 0

    @classmethod
    def of(cls, folder: Path) -> _RaplCounter | None:
        """None where the system does not let us read it."""
        try:
            name = (folder / "name").read_text().strip()
            return cls(folder, name, int((folder / "max_energy_range_uj").read_text()))
        except (OSError, ValueError):
            return None

    def read_joules(self) -> float:
        now_uj = int(self._file.read_text())
        self._rounds += now_uj < self._last_uj
        self._last_uj = now_uj
        return (now_uj + self._rounds * self._range_uj) / 1e6


def nvidia_meter(index: int = 0, *, library: Any = None) -> EnergyMeter | None:
    """The counter of GPU ``index``, from the driver's own library (NVML); None without driver, GPU or counter.

    ``library``: the loaded ``libnvidia-ml``; None loads it.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1") if library is None else library
    except OSError:
        return None
    handle = ctypes.c_void_p()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)):
        return None

    def read_joules() -> float:
        millijoules = ctypes.c_ulonglong()
        status = nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        if status:
            raise OSError(f"NVML cannot read the energy counter of GPU {index}: status {status}")
        return millijoules.value / 1e3

    try:
        read_joules()
    except OSError:  # counters came with the Volta generation
        return None
    return EnergyMeter(f"NVML (GPU {index})", read_joules)


def _gpu_index(device: str) -> int:
    return int(device.partition(":")[2] or 0)
