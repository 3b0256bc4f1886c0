"""From records to tables: the figures of every model, and the talk's marks beside those of one model per family."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sidestream.evals.compare_talk import FAMILIES, MARKS, OK, TALK_FAMILIES

Record = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]
"""(header, rows), all text."""

MISSING = "-"
NO_ENERGY = "not measurable here"


@dataclass
class Figures:
    """What was measured of one model; None where it was not."""

    model: str
    family: str
    num_parameters: int | None = None
    flops: Record | None = None
    causality: Record | None = None
    speed: list[Record] = field(default_factory=list)
    """One per repeat."""
    memory: dict[tuple[str, int], Record] = field(default_factory=dict)
    """(work, frames) -> record, also of what was left out or failed."""
    accuracy: list[Record] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    """Part -> why there is no figure."""

    def median(self, name: str) -> float | None:
        """Over the repeats; None where there are none (or no counter)."""
        values = [r[name] for r in self.speed if r.get(name) is not None]
        return statistics.median(values) if values else None

    def peak_bytes(self, work: str, num_frames: int) -> int | None:
        """Beyond the parameters."""
        return self.memory.get((work, num_frames), {}).get("peak_bytes")

    def top1(self) -> float | None:
        """The accuracy of training from scratch, which is the same for all models, 0..1."""
        return next((r["top1"] for r in self.accuracy if "scratch" in str(r.get("method")) and "top1" in r), None)


def collect(records: Iterable[Record], accuracies: Iterable[Record] = ()) -> list[Figures]:
    """One per model, in the order in which they were first measured."""
    found: dict[str, Figures] = {}
    for r in records:
        figures = found.setdefault(r["model"], Figures(r["model"], r["family"]))
        part = r["part"]
        if part == "memory":
            figures.memory[r["work"], r["num_frames"]] = r
        elif "error" in r:
            figures.errors[part] = r["error"]
        elif part == "params":
            figures.num_parameters = r["num_parameters"]
        elif part == "latency":
            figures.speed.append(r)
        else:
            setattr(figures, part, r)
    for r in accuracies:
        if r.get("model") in found:
            found[r["model"]].accuracy.append(r)
    return list(found.values())


def speed_table(found: Sequence[Figures]) -> Table:
    """On a stream, a row for each model: latency, throughput, energy, and whether it is causal."""
    header = [
        "model",
        "family",
        "causal",
        "latency, ms",
        "look-ahead, frames",
        "frames/s",
        "answer every",
        "whole clip, ms",
        "mJ/frame",
    ]
    return header, [_speed_row(f) for f in found]


def _speed_row(f: Figures) -> list[str]:
    speed = f.speed[0] if f.speed else {}
    window = ", window" if speed.get("stream_kind") == "sliding window" else ""
    joules = f.median("joules_per_frame")
    return [
        f.model,
        FAMILIES[f.family],
        _causal(f),
        spread([r["latency_seconds"] * 1e3 for r in f.speed]),
        str(speed.get("stream_delay_ticks", MISSING)),
        spread([r["frames_per_second"] for r in f.speed]),
        f"{speed['stream_period_ticks']}{window}" if speed else MISSING,
        _scaled(f.median("clip_seconds"), 1e-3),
        NO_ENERGY if joules is None else _scaled(joules, 1e-3),
    ]


def cost_table(found: Sequence[Figures], num_frames: int) -> Table:
    """What each model takes: parameters, operations, memory; and what it is worth. ``num_frames``: of the clips."""
    header = [
        "model",
        "M parameters",
        f"GFLOPs, clip of {num_frames}",
        "GFLOPs / stream frame",
        f"MiB, training step, {num_frames} frames",
        f"MiB, test, clip of {num_frames}",
        "MiB, test, stream",
        "top-1, %",
    ]
    return header, [_cost_row(f, num_frames) for f in found]


def _cost_row(f: Figures, num_frames: int) -> list[str]:
    flops = f.flops or {}
    return [
        f.model,
        _scaled(f.num_parameters, 1e6),
        _scaled(flops.get("clip_flops"), 1e9),
        _scaled(flops.get("stream_flops_per_frame"), 1e9, digits=2),
        _mib(f, "train", num_frames),
        _mib(f, "clip", num_frames),
        _mib(f, "stream", num_frames),
        _scaled(f.top1(), 0.01),
    ]


def training_memory_table(found: Sequence[Figures]) -> Table:
    """Peak of a training step against the length of the clip, MiB beyond the parameters."""
    lengths = sorted({n for f in found for work, n in f.memory if work == "train"})
    header = ["model", "parameters, MiB", *(f"{n} frames, MiB" for n in lengths)]
    rows = []
    for f in found:
        held = next((r["parameter_bytes"] for r in f.memory.values() if "parameter_bytes" in r), None)
        rows.append([f.model, _scaled(held, 2**20), *(_mib(f, "train", n) for n in lengths)])
    return header, rows


def accuracy_table(accuracies: Iterable[Record]) -> Table:
    """Every accuracy that was given, also of other models, with how it came about."""
    rows = []
    for r in accuracies:
        how = [str(r[name]) for name in ("weights", "budget", "input") if r.get(name)]
        rows.append(
            [str(r["model"]), str(r.get("method", MISSING)), _scaled(r["top1"], 0.01), "; ".join(how) or MISSING]
        )
    return ["model", "method", "top-1, %", "how"], rows


def representatives(found: Sequence[Figures]) -> dict[str, Figures]:
    """Family -> the model that stands for it: the first of the family."""
    chosen: dict[str, Figures] = {}
    for f in found:
        chosen.setdefault(f.family, f)
    return chosen


@dataclass(frozen=True)
class Criterion:
    """A row of the talk's table, and what is measured for it."""

    name: str
    shown: Callable[[Figures, int], str]
    value: Callable[[Figures, int], float | None]
    """What is compared; less is better."""


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


CRITERIA = (
    Criterion("accuracy", lambda f, n: _unit(f.top1(), 0.01, "%"), lambda f, n: _negative(f.top1())),
    Criterion("latency / throughput", lambda f, n: _speed(f), lambda f, n: f.median("latency_seconds")),
    Criterion(
        "memory at training",
        lambda f, n: _unit(f.peak_bytes("train", n), 2**20, "MiB"),
        lambda f, n: f.peak_bytes("train", n),
    ),
    Criterion(
        "memory at test",
        lambda f, n: f"{_mib(f, 'clip', n)} MiB clip, {_mib(f, 'stream', n)} MiB stream",
        lambda f, n: f.peak_bytes("stream", n),
    ),
    Criterion(
        "energy",
        lambda f, n: _unit(f.median("joules_per_frame"), 1e-3, "mJ/frame", missing=NO_ENERGY),
        lambda f, n: f.median("joules_per_frame"),
    ),
    Criterion("causal", lambda f, n: _causal(f), lambda f, n: None),
)


def talk_table(found: Sequence[Figures], num_frames: int) -> Table:
    """The talk's table: each mark beside the measured figure of the family's first model, and what becomes of it."""
    chosen = representatives(found)
    stands = [chosen.get(family) for family in TALK_FAMILIES]
    titles = [FAMILIES[t] + (f": {f.model}" if f else "") for t, f in zip(TALK_FAMILIES, stands, strict=True)]
    rows = []
    for criterion in CRITERIA:
        marks = MARKS[criterion.name]
        cells = [f"{m} {criterion.shown(f, num_frames) if f else MISSING}" for m, f in zip(marks, stands, strict=True)]
        rows.append([criterion.name, *cells, verdict(criterion, stands, num_frames)])
    return ["", *titles, "the talk's marks, measured here"], rows


def verdict(criterion: Criterion, stands: Sequence[Figures | None], num_frames: int) -> str:
    """Confirmed where every model marked ✓ measures better than every one marked ✗; the talk gives no thresholds."""
    marks = MARKS[criterion.name]
    if criterion.name == "causal":
        return _causal_verdict(marks, stands)
    values = [None if f is None else criterion.value(f, num_frames) for f in stands]
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return "not measured for all families"
    if len(set(marks)) == 1:
        low, high = sorted(abs(v) for v in known)[:: len(known) - 1]
        ratio = f"; measured, they differ by a factor of {high / low:.1f}" if low > 0 else ""
        return f"the same mark for all, so no order to check{ratio}"
    names = [f.model if f else "" for f in stands]
    pairs = [(i, j) for i in range(len(marks)) for j in range(len(marks)) if marks[i] == OK != marks[j]]
    wrong = [f"{names[j]} is as good as {names[i]} or better" for i, j in pairs if known[j] <= known[i]]
    return "confirmed" if not wrong else "not confirmed: " + "; ".join(wrong)


def _causal_verdict(marks: Sequence[str], stands: Sequence[Figures | None]) -> str:
    known = [(mark, f) for mark, f in zip(marks, stands, strict=True) if f is not None and f.causality is not None]
    if len(known) < len(marks):
        return "not measured for all families"
    wrong = [f"{f.model} is {_causal(f)}" for mark, f in known if (mark == OK) != f.causality["is_causal"]]  # type: ignore[index]
    return "confirmed by poisoning" if not wrong else "not confirmed: " + "; ".join(wrong)


def spread(values: Sequence[float]) -> str:
    """ "median [least – greatest]"."""
    if not values:
        return MISSING
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.median(values):.1f} [{min(values):.1f} – {max(values):.1f}]"


def _speed(f: Figures) -> str:
    latency, rate = f.median("latency_seconds"), f.median("frames_per_second")
    if latency is None or rate is None:
        return MISSING
    delay = f.speed[0]["stream_delay_ticks"]
    return f"{latency * 1e3:.0f} ms{f' + {delay} frames' if delay else ''}, {rate:.1f} frames/s"


def _causal(f: Figures) -> str:
    if f.causality is None:
        return MISSING
    if f.causality["is_causal"]:
        return "causal"
    return "not causal" + (" (one answer per clip)" if f.causality["num_answers"] == 1 else "")


def _mib(f: Figures, work: str, num_frames: int) -> str:
    record = f.memory.get((work, num_frames), {})
    if "peak_bytes" in record:
        return f"{record['peak_bytes'] / 2**20:.0f}"
    return "skipped" if "skipped" in record else "failed" if "error" in record else MISSING


def _scaled(value: float | None, unit: float, *, digits: int = 1) -> str:
    return MISSING if value is None else f"{value / unit:.{digits}f}"


def _unit(value: float | None, unit: float, name: str, *, missing: str = MISSING) -> str:
    return missing if value is None else f"{value / unit:.1f} {name}"
