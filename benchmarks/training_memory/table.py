"""table.md and memory.png from results.jsonl.

"Activations" is the peak beyond what was held before the step, less one gradient of all weights: what the rule keeps
to go back, scratch space, and every further copy of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sidestream.report.record import read_json_lines, write_beside, write_text

MIB = 2**20


def activation_bytes(record: dict[str, Any]) -> int:
    return record["peak_bytes"] - record["gradient_bytes"]


def write_all(results: Path, folder: Path) -> None:
    """The newest record of each case counts."""
    newest = {tuple(r["case"].values()): r for r in read_json_lines(results)}
    done = [r for r in newest.values() if "failed" not in r]
    text = "\n".join(line for batch_size in sorted(_all(done, "batch_size")) for line in _table(done, batch_size))
    write_text(folder / "table.md", text + "\n")
    print(text)
    draw(done, folder / "memory.png")


def _all(records: Sequence[dict[str, Any]], name: str) -> list[Any]:
    return list(dict.fromkeys(r["case"][name] for r in records))


def _table(records: Sequence[dict[str, Any]], batch_size: int) -> list[str]:
    """Activations in MiB, their growth, and the share of backprop's."""
    some = [r for r in records if r["case"]["batch_size"] == batch_size]
    lengths, rules = sorted(_all(some, "num_frames")), _all(some, "rule")
    found = {(r["case"]["rule"], r["case"]["num_frames"]): activation_bytes(r) / MIB for r in some}
    model, size_px = some[0]["case"]["model"], some[0]["case"]["size_px"]
    lines = [
        f"{model}, {size_px} px, batch {batch_size}: activations in MiB",
        "",
        "| rule | "
        + " | ".join(f"{n} frames" for n in lengths)
        + " | most / least, 16 frames on | of backprop's at 64 |",
        "| --- |" + " ---: |" * (len(lengths) + 2),
    ]
    for rule in rules:
        values = [found.get((rule, n)) for n in lengths]
        full = [v for n, v in zip(lengths, values, strict=True) if v is not None and n >= 16]
        growth = f"{max(full) / min(full):.3f}" if full else ""
        share = ""
        if (rule, 64) in found and ("backprop", 64) in found:
            share = f"{found[rule, 64] / found['backprop', 64]:.3f}"
        cells = ["" if v is None else f"{v:.1f}" for v in values]
        lines.append(f"| {rule} | " + " | ".join([*cells, growth, share]) + " |")
    held = {r["case"]["rule"]: r["parameter_bytes"] / MIB for r in some}
    lines.append("")
    lines.append(
        "Weights, and each of gradient and momentum, in MiB: " + ", ".join(f"{k} {v:.1f}" for k, v in held.items())
    )
    return [*lines, ""]


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    batches = sorted(_all(records, "batch_size"))
    figure = Figure(figsize=(5 * len(batches), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, batch_size in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        for rule in _all(records, "rule"):
            some = [r for r in records if (r["case"]["rule"], r["case"]["batch_size"]) == (rule, batch_size)]
            points = sorted((r["case"]["num_frames"], activation_bytes(r) / MIB) for r in some)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=rule)
        axes.set(xscale="log", yscale="log", xlabel="frames of the clip", ylabel="activations (MiB)")
        axes.set_xticks(lengths := sorted(_all(records, "num_frames")), [str(n) for n in lengths])
        axes.set_title(f"batch {batch_size}")
        axes.grid(alpha=0.3)
        axes.legend()
    with write_beside(path) as part:
        figure.savefig(part, format="png", dpi=110)
