"""Broken copies of whole clips end in frames or in one clear error: no crash, no hang, no other exception."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("fuzz_worker.py")
NUM_PROCESSES = 2
SECONDS_PER_CASE = 20


def broken(data: bytes, rng: random.Random) -> bytes:
    """A copy with bytes flipped, cut short, or spliced (a stretch moved, doubled, taken out or zeroed)."""
    kind = rng.choice(("flip", "flip few", "cut", "splice", "remove", "zero", "header"))
    copy = bytearray(data)
    at, length = rng.randrange(len(data)), rng.randrange(1, max(2, len(data) // 8))
    if kind in ("flip", "flip few"):
        for _ in range(max(1, len(data) // 500) if kind == "flip" else rng.randrange(1, 10)):
            copy[rng.randrange(len(copy))] = rng.randrange(256)
    elif kind == "cut":
        copy = copy[:at]
    elif kind == "splice":
        to = rng.randrange(len(data))
        copy[to:to] = data[at : at + length]
    elif kind == "remove":
        del copy[at : at + length]
    elif kind == "zero":
        copy[at : at + length] = bytes(min(length, len(data) - at))
    else:
        for _ in range(20):
            copy[rng.randrange(min(2000, len(copy)))] ^= 1 << rng.randrange(8)
            copy[-rng.randrange(1, min(2000, len(copy)))] ^= 1 << rng.randrange(8)
    return bytes(copy)


def run_cases(originals: list[Path], folder: Path, num_cases: int, seed: int) -> dict[str, str]:
    """Outcome of every broken copy, by name."""
    rng = random.Random(seed)
    names = []
    for number in range(num_cases):
        original = originals[number % len(originals)]
        path = folder / f"{number:03d}_{original.name}"
        path.write_bytes(broken(original.read_bytes(), rng))
        names.append(str(path))
    workers = [
        subprocess.Popen([sys.executable, str(WORKER), *names[k::NUM_PROCESSES]], stdout=-1, stderr=-1, text=True)
        for k in range(NUM_PROCESSES)
    ]
    outcomes: dict[str, str] = {}
    for worker in workers:
        try:
            out, error = worker.communicate(timeout=60 + SECONDS_PER_CASE * num_cases)
        finally:
            worker.kill()
        lines = [line.split("\t", 1) for line in out.splitlines()]
        outcomes.update({line[0]: line[1] for line in lines})
        assert worker.returncode == 0, f"a reader died after {lines[-1:]}: {error[-2000:]}"
    assert sorted(outcomes) == sorted(names)
    return outcomes


def check(outcomes: dict[str, str]) -> None:
    bad = {name: text for name, text in outcomes.items() if not text.startswith(("frames ", "refused: "))}
    assert not bad
    # the damage was neither so small that nothing broke nor so large that nothing could be read
    assert any(text.startswith("frames") for text in outcomes.values())
    assert any(text.startswith("refused") for text in outcomes.values())


def test_broken_copies_of_our_own_clip(own_clip: Path, long_clip: Path, tmp_path: Path) -> None:
    check(run_cases([own_clip, long_clip], tmp_path, 30, seed=1))


@pytest.fixture(scope="module")
def real_clips(data_dir: Path) -> list[Path]:
    small = sorted((data_dir / "jhmdb" / "videos").rglob("*.mp4"))[::90]
    clips = [p for p in sorted((data_dir / "clips").iterdir()) if p.stat().st_size < 2_000_000]
    return [*clips, *small, next((data_dir / "grid_s1").rglob("*.mp4"))]


def test_broken_copies_of_real_clips(real_clips: list[Path], tmp_path: Path) -> None:
    check(run_cases(real_clips, tmp_path, 30, seed=2))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_300_broken_copies_of_real_clips(real_clips: list[Path], tmp_path: Path) -> None:
    check(run_cases(real_clips, tmp_path, 300, seed=3))
