"""The lines under the demo's table, from plain numbers; and what the system tells of other programs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from sidestream.cli.demo_notes import CpuTimes, busy_ticks, cores_of_others, notes

STAT = """cpu  300 30 60 9000 70 6 9 50 0 0
cpu0 100 10 20 3000 30 1 2 20 0 0
cpu1 200 20 40 6000 40 5 7 30 0 0
cpu10 1 1 1 1 1 1 1 1 1 1
intr 5 5
"""


def test_busy_is_neither_idle_nor_waiting_and_only_of_the_cores_that_may_be_used() -> None:
    assert busy_ticks(STAT, {0}) == 100 + 10 + 20 + 1 + 2
    assert busy_ticks(STAT, {0, 1}) == 133 + 200 + 20 + 40 + 5 + 7
    assert busy_ticks(STAT, {10}) == 5


def test_what_is_not_our_own_is_of_others() -> None:
    before, after = CpuTimes(10.0, 500.0, 3.0), CpuTimes(18.0, 514.0, 9.0)
    assert cores_of_others(before, after) == pytest.approx((14 - 6) / 8)
    assert cores_of_others(before, CpuTimes(18.0, 505.0, 9.0)) == 0.0  # ticks are coarse
    assert cores_of_others(None, after) == cores_of_others(before, None) == 0.0


@pytest.mark.skipif(CpuTimes.now() is None, reason="the system does not tell what its cores do")
def test_a_program_at_work_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            before, began = CpuTimes.now(), _user_seconds(other.pid)
            until = time.monotonic() + 0.6
            while time.monotonic() < until:
                pass
            after, ended = CpuTimes.now(), _user_seconds(other.pid)
        finally:
            other.kill()
    assert before is not None
    assert after is not None
    seconds = after.at_seconds - before.at_seconds
    assert cores_of_others(before, after) > (ended - began) / seconds - 0.15
    assert after.own_seconds - before.own_seconds > 0


def _user_seconds(pid: int) -> float:
    import os

    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_lines() -> None:
    busy = "other programs use 1.0 of 2 cores: the forecast does not hold"
    slow = "the clip came at 48.3 frames/s: no more than that can be answered"
    assert notes(109.1, 48.3, others=1.02, num_cores=2, num_workers=2) == [busy, slow]
    assert notes(40.0, 60.0, others=1.02, num_cores=2, num_workers=2) == [busy]
    assert notes(109.1, 48.3, others=0.1, num_cores=2, num_workers=2) == [slow]
    assert notes(109.1, 48.3, others=1.0, num_cores=8, num_workers=4) == [slow]  # there are cores to spare
    assert notes(None, 0.0, others=0.0, num_cores=0, num_workers=2) == []  # nothing is known
