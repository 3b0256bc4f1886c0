"""results.jsonl as numbers per candidate: medians and spread over the passes. Pure functions of plain records."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

REFERENCE = "eager, 1 thread"
Record = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of one number over the passes."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        found = list(values)
        return cls(statistics.median(found), min(found), max(found)) if found else None


@dataclass(frozen=True)
class Row:
    """One candidate on one model under one condition."""

    model: str
    candidate: str
    condition: str
    kind: str
    frames_per_second: Spread
    ratio: Spread | None
    """Frames per second over those of ``eager, 1 thread`` in the same pass and condition."""
    kept: Spread | None
    """Frames per second over those of the same candidate in the same pass, quiet."""
    latency_p50_ms: float
    others_cores: float
    """The most that other processes used during any of its measurements, in cores."""
    num_passes: int
    picked: tuple[str, ...] = ()
    """What ``auto`` picked, over the passes."""


def rows(records: Sequence[Record]) -> list[Row]:
    """One row per (model, condition, candidate), in the order of first appearance of the models."""
    by_key = {(r["model"], r["condition"], r["candidate"], r["pass"]): r for r in records}
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for (model, condition, candidate, _), record in by_key.items():
        groups.setdefault((model, condition, candidate), []).append(record)
    return [_row(group, by_key) for group in groups.values()]


def best(found: Iterable[Row], *kinds: str) -> Row | None:
    """The row of one of these kinds with the most frames per second."""
    fitting = [row for row in found if row.kind in kinds]
    return max(fitting, key=lambda row: row.frames_per_second.median, default=None)


def _row(group: list[Record], by_key: dict[tuple[str, str, str, int], Record]) -> Row:
    first = group[0]
    model, condition, candidate = first["model"], first["condition"], first["candidate"]

    def against(condition: str, candidate: str) -> Spread | None:
        others = [(r, by_key.get((model, condition, candidate, r["pass"]))) for r in group]
        return Spread.of(r["frames_per_second"] / o["frames_per_second"] for r, o in others if o is not None)

    speed = Spread.of(r["frames_per_second"] for r in group)
    assert speed is not None
    return Row(
        model=model,
        candidate=candidate,
        condition=condition,
        kind=first["kind"],
        frames_per_second=speed,
        ratio=against(condition, REFERENCE),
        kept=None if condition == "quiet" else against("quiet", candidate),
        latency_p50_ms=statistics.median(r["latency_p50_ms"] for r in group),
        others_cores=max(r["others_cores"] for r in group),
        num_passes=len(group),
        picked=tuple(sorted({r["notes"]["picked"] for r in group if "picked" in r["notes"]})),
    )
