"""A runtime profile: how long each stage took on each frame, measured once, drawn again by a seed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sidestream.circuit.ages import latency_ticks, look_ahead_ticks
from sidestream.circuit.wire import Circuit
from sidestream.errors import InputError
from sidestream.report.record import write_text

FilePath = str | os.PathLike[str]
NUM_WARM_UP = 3
"""Ticks at the start that are run and not recorded."""


@dataclass(frozen=True, slots=True)
class RuntimeProfile:
    """Runtimes in seconds: a row for each recorded frame, a column for each stage (one, for a model as a whole)."""

    rows_seconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.rows_seconds}
        if len(widths) != 1 or 0 in widths:
            raise InputError(f"a profile with rows of {sorted(widths)} stages; give 1 row or more, all of one length")
        if not all(math.isfinite(s) and s >= 0 for row in self.rows_seconds for s in row):
            raise InputError("a profile holds runtimes below 0, NaN or infinite; give seconds")

    @property
    def num_stages(self) -> int:
        return len(self.rows_seconds[0])

    @property
    def mean_seconds(self) -> float:
        """Mean time for a whole frame, the stages one after the other."""
        return float(np.mean([sum(row) for row in self.rows_seconds]))

    def scaled(self, factor: float) -> RuntimeProfile:
        """A machine that needs ``factor`` times as long."""
        return RuntimeProfile(tuple(tuple(s * factor for s in row) for row in self.rows_seconds))

    def draw_rows(self, frame_rate: float, *, seed: int = 0) -> Iterator[tuple[float, ...]]:
        """Recorded rows at random, with repeats, without end: runtimes of the stages in frames of that rate."""
        chance = np.random.default_rng(seed)
        while True:
            row = self.rows_seconds[int(chance.integers(len(self.rows_seconds)))]
            yield tuple(s * frame_rate for s in row)

    def draw(self, frame_rate: float, *, seed: int = 0) -> Iterator[float]:
        """The same rows as times for whole frames, the stages one after the other."""
        for row in self.draw_rows(frame_rate, seed=seed):
            yield sum(row)

    def write(self, path: FilePath, **about: Any) -> None:
        """JSON, beside and then renamed. ``about``: plain values, such as the machine's name."""
        write_text(path, json.dumps({"rows_seconds": self.rows_seconds, "about": about}, indent=1) + "\n")

    @classmethod
    def read(cls, path: FilePath) -> RuntimeProfile:
        """Raises ``InputError`` for a file that ``write`` did not make."""
        try:
            rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows_seconds"]
            return cls(tuple(tuple(float(s) for s in row) for row in rows))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} is no runtime profile: {type(error).__name__}: {error}") from error


def record_profile(circuit: Circuit, frames: Iterable[Any], *, prepare: Any = None) -> RuntimeProfile:
    """Run ``circuit`` on one thread and record how long each stage takes on each frame, after 3 that do not count.

    The stages are measured one after the other on one thread; where they share cores in a real run they are slower.
    Ticks behind the last frame, in which a pipeline empties and some stages rest, do not count either.

    Raises ``InputError`` for too few frames: 4, and one more for each tick of the circuit's delay.
    """
    from sidestream.engine import run

    running = run(circuit, frames, executor="inline", prepare=prepare)
    before: tuple[float, ...] | None = None
    rows: list[tuple[float, ...]] = []
    ticks: list[int] = []
    for out in running:
        busy = running.stats.busy_seconds
        if before is not None:
            rows.append(tuple(now - then for now, then in zip(busy, before, strict=True)))
            ticks.append(out.tick)
        before = busy
    num_frames = running.stats.num_frames
    kept = [row for tick, row in zip(ticks, rows, strict=True) if tick < num_frames][NUM_WARM_UP - 1 :]
    if not kept:
        least = NUM_WARM_UP + 1 + latency_ticks(circuit) + look_ahead_ticks(circuit)
        raise InputError(f"{num_frames} frames are too few for a profile of this circuit; give {least} or more")
    return RuntimeProfile(tuple(kept))
