"""Memory stays flat, however long the stream."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("memory_worker.py")
LIMIT_BYTES = 30 * 2**20


def check_flat(source: str | Path, num_frames: int) -> None:
    arguments = [sys.executable, str(WORKER), str(source), str(num_frames)]
    out = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=1500).stdout
    seen, begin_bytes, most_bytes = map(int, out.split())
    assert seen == num_frames
    assert begin_bytes > 0
    assert most_bytes - begin_bytes < LIMIT_BYTES, f"grew by {(most_bytes - begin_bytes) / 2**20:.1f} MB"


def test_two_minutes_of_synthetic_stream() -> None:
    check_flat("synthetic:size=64x80", 3000)


def test_a_looped_file(own_clip: Path) -> None:
    check_flat(own_clip, 3000)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_hour_of_synthetic_stream() -> None:
    check_flat("synthetic:size=64x80", 90_000)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_long_file(data_dir: Path) -> None:
    check_flat(data_dir / "clips" / "shots_212s.mp4", 20_000)
