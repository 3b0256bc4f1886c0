"""Energy counters, read from made-up system trees and a stand-in for NVIDIA's library."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from sidestream.report.energy import energy_meter, nvidia_meter, rapl_meter


def package(root: Path, folder: str, name: str, energy_uj: int, range_uj: int = 1000) -> Path:
    (root / folder).mkdir(parents=True)
    (root / folder / "name").write_text(name + "\n")
    (root / folder / "energy_uj").write_text(f"{energy_uj}\n")
    (root / folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return root / folder / "energy_uj"


def test_packages_are_summed_their_parts_left_out_and_rounds_followed(tmp_path: Path) -> None:
    first = package(tmp_path, "intel-rapl:0", "package-0", 900)
    second = package(tmp_path, "intel-rapl:1", "package-1", 50)
    package(tmp_path, "intel-rapl:0:0", "core", 700)
    package(tmp_path, "intel-rapl-mmio:0", "package-0", 700)
    meter = rapl_meter(tmp_path)
    assert meter is not None
    assert meter.source == "RAPL (package-0, package-1)"
    before = meter.read_joules()
    assert before == pytest.approx(950e-6)
    first.write_text("100\n")  # from 900 over 1000 to 100
    second.write_text("60\n")
    assert meter.read_joules() - before == pytest.approx(210e-6)
    first.write_text("50\n")
    assert meter.read_joules() - before == pytest.approx(1160e-6)


def test_no_counter_is_no_meter(tmp_path: Path) -> None:
    assert rapl_meter(tmp_path / "nowhere") is None
    assert energy_meter("cpu", rapl_root=tmp_path) is None
    (tmp_path / "intel-rapl:0").mkdir()  # there, but nothing in it may be read
    assert energy_meter("cpu", rapl_root=tmp_path) is None


class Nvml:
    """What the driver's library answers; a status of 0 is success."""

    def __init__(self, *, init: int = 0, handle: int = 0, energy: int = 0) -> None:
        self.statuses, self.millijoules, self.index = (init, handle, energy), 2500, -1

    def nvmlInit_v2(self) -> int:
        return self.statuses[0]

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        self.index = index.value
        return self.statuses[1]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, millijoules: Any) -> int:
        ctypes.cast(millijoules, ctypes.POINTER(ctypes.c_ulonglong))[0] = self.millijoules
        return self.statuses[2]


def test_the_gpu_counter_is_in_joules() -> None:
    library = Nvml()
    meter = nvidia_meter(1, library=library)
    assert meter is not None
    assert (library.index, meter.source) == (1, "NVML (GPU 1)")
    before = meter.read_joules()
    library.millijoules += 4000
    assert meter.read_joules() - before == pytest.approx(4.0)


@pytest.mark.parametrize("failing", ["init", "handle", "energy"])
def test_a_gpu_without_counter_is_no_meter(failing: str) -> None:
    assert nvidia_meter(library=Nvml(**{failing: 3})) is None
