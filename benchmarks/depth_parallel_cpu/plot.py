"""Draws throughput.png from results.jsonl: one panel per model, one bar per candidate, whiskers from least to greatest.

python benchmarks/depth_parallel_cpu/plot.py [--results FILE] [--out FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from summary import Row, rows

from sidestream.report.record import read_json_lines, write_beside

HERE = Path(__file__).parent
COLOURS = {
    "eager": "#8c8c8c",
    "rival": "#4c72b0",
    "frame-parallel": "#8172b3",
    "pipelined": "#dd8452",
    "auto": "#55a868",
}


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars: frames per second on a quiet machine; black marks: with one core busy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = rows(records)
    models = list(dict.fromkeys(row.model for row in found))
    num_rows = max(len({row.candidate for row in found if row.model == model}) for model in models)
    figure, axes = plt.subplots(
        1, len(models), figsize=(1.8 + 4.6 * len(models), 1.4 + 0.24 * num_rows), squeeze=False, layout="constrained"
    )
    for axis, model in zip(axes[0], models, strict=True):
        _panel(axis, [row for row in found if row.model == model])
        axis.set_title(model)
        axis.set_xlabel("frames per second")
    handles = [plt.Rectangle((0, 0), 1, 1, color=c, label=kind) for kind, c in COLOURS.items()]
    handles.append(plt.Line2D([], [], color="black", marker="d", linestyle="none", label="with one core busy"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 2 + 2 * len(models)), frameon=False
    )
    with write_beside(path) as part:
        figure.savefig(part, format="png", dpi=110)
    plt.close(figure)


def _panel(axis: Any, found: Sequence[Row]) -> None:
    quiet = sorted((r for r in found if r.condition == "quiet"), key=lambda r: r.frames_per_second.median)
    place = {row.candidate: n for n, row in enumerate(quiet)}
    speeds = [row.frames_per_second for row in quiet]
    whiskers = [[s.median - s.least for s in speeds], [s.greatest - s.median for s in speeds]]
    colours = [COLOURS[row.kind] for row in quiet]
    axis.barh(range(len(quiet)), [s.median for s in speeds], xerr=whiskers, color=colours, error_kw={"lw": 0.8})
    busy = [row for row in found if row.condition == "busy" and row.candidate in place]
    axis.plot([r.frames_per_second.median for r in busy], [place[r.candidate] for r in busy], "kd", markersize=4)
    axis.set_yticks(range(len(quiet)), [row.candidate for row in quiet], fontsize=7)
    axis.set_ylim(-0.6, len(quiet) - 0.4)
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "throughput.png")
    options = parser.parse_args()
    draw(read_json_lines(options.results), options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
