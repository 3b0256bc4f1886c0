"""Percentiles against NumPy, memory against psutil, and the readers of the system's files against texts."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestream.report import machine, measure, peak_rss_bytes, percentiles

MIB = 2**20


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.lists(st.floats(0, 100), min_size=1, max_size=5))
def test_percentiles_equal_numpy(values, percents):
    ours = percentiles(values, percents)
    np.testing.assert_allclose(ours, np.percentile(values, percents), rtol=1e-9, atol=1e-6)


def test_percentiles_by_hand():
    assert percentiles(iter([4.0, 1.0, 3.0, 2.0, 5.0])) == pytest.approx((3.0, 4.8, 4.96))
    assert percentiles([7.0]) == (7.0, 7.0, 7.0)
    assert all(math.isnan(p) for p in percentiles([]))


def fresh_process(code: str) -> list[int]:
    """The numbers that a fresh interpreter prints (this one's peak depends on the tests before)."""
    code = "from sidestream.report.measure import peak_rss_bytes; import psutil\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    return [int(word) for word in done.stdout.split()]


def test_peak_memory_goes_up_with_what_is_held_and_stays():
    before, now, peak, after = fresh_process(
        "before, now = peak_rss_bytes(), psutil.Process().memory_info().rss\n"
        "held = bytearray(b'x') * (200 << 20); peak = peak_rss_bytes(); del held\n"
        "print(before, now, peak, peak_rss_bytes())"
    )
    assert before == pytest.approx(now, rel=0.2)
    assert peak - before == pytest.approx(200 * MIB, abs=16 * MIB)
    assert after == pytest.approx(peak, abs=2 * MIB)  # the kernel counts in batches per thread


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_child_does_not_report_its_parents_peak():
    held = bytearray(b"x") * (300 * MIB)
    (child,) = fresh_process("print(peak_rss_bytes())")
    assert child < 200 * MIB < len(held) <= peak_rss_bytes()


def test_machine_names_what_a_record_needs():
    found = machine()
    assert found["num_cores"] <= os.cpu_count()
    assert found["memory_bytes"] <= psutil.virtual_memory().total
    assert found["memory_bytes"] >= 2**28
    assert found["python"] == sys.version.split()[0]
    assert found["torch"][0].isdigit()
    assert found["cpu"]


@pytest.mark.parametrize(
    ("text", "cores"), [("150000 100000\n", 1.5), ("max 100000\n", None), ("", None), ("25000 50000", 0.5)]
)
def test_cpu_limit_of_a_container(text, cores):
    assert measure.cpu_limit_cores(text) == cores


def test_num_cores_is_cut_by_the_container(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for limit, cores in {"250000 100000": 3, "10000 100000": 1, "max 100000": 8, "1600000 100000": 8}.items():
        monkeypatch.setattr(measure, "_read", lambda path, limit=limit: limit)
        assert measure.num_cores() == cores, limit


def test_memory_is_cut_by_the_container(monkeypatch):
    files = {"/proc/meminfo": "MemTotal:  2048 kB\nMemFree: 1 kB\n", "/sys/fs/cgroup/memory.max": "1048576\n"}
    monkeypatch.setattr(measure, "_read", lambda path: files.get(path, ""))
    assert measure.memory_bytes() == 1048576
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert measure.memory_bytes() == 2048 * 1024
    files.clear()
    assert measure.memory_bytes() is None


def test_version_of_a_package_that_is_not_there():
    assert measure.package_version("no-such-package-at-all") is None
    assert measure.package_version("numpy") == np.__version__
