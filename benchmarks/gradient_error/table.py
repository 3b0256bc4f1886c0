"""table.md and gradient_error.png from results.jsonl: means over the clips."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sidestream.report.record import read_json_lines, write_beside, write_text

Records = Sequence[dict[str, Any]]
STUDIES = {
    "frame step": "frame step (Weizmann, 4 stages)",
    "speed": "speed (synthetic, 4 stages)",
    "stages": "number of stages (Weizmann)",
    "learning rate": "learning rate, update per tick (4 stages)",
    "share of motion": "share of the motion left (4 stages)",
}


def mean(records: Records, name: str) -> float | None:
    values = [r[name] for r in records if r.get(name) is not None]
    return sum(values) / len(values) if values else None


def curve(records: Records, name: str, **where: Any) -> tuple[list[float], list[float]]:
    """x and mean y over the clips, of the records in which all of ``where`` holds."""
    own = [r for r in records if all(r.get(k) == v for k, v in where.items())]
    points = [(x, mean([r for r in own if r["value"] == x], name)) for x in dict.fromkeys(r["value"] for r in own)]
    known = [(x, y) for x, y in points if y is not None]
    return [p[0] for p in known], [p[1] for p in known]


def write_all(results: Path, folder: Path) -> None:
    head, *records = read_json_lines(results)
    lines = [f"Trained net: {head['training']}; {head['num_clips']} clips.", ""]
    for study, title in STUDIES.items():
        lines += _table([r for r in records if r["study"] == study], title)
    write_text(folder / "table.md", "\n".join(lines))
    draw(records, folder / "gradient_error.png")


def _table(records: Records, title: str) -> list[str]:
    """Stage 1 (the largest gap) and the whole net."""
    names = ("cosine", "norm_ratio", "error", "bound", "motion_bound", "parameter_slope", "motion", "weight_change")
    header = ["net", title.split(" (")[0], "whole net: cosine", "error", *(f"stage 1: {names[0]}", *names[1:])]
    lines = [f"## {title}", "", "| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    for net in dict.fromkeys(r["net"] for r in records):
        for value in dict.fromkeys(r["value"] for r in records):
            own = [r for r in records if (r["net"], r["value"]) == (net, value)]
            whole, first = ([r for r in own if r["stage"] == n] for n in (0, 1))
            cells = [mean(whole, "cosine"), mean(whole, "error"), *(mean(first, name) for name in names)]
            lines.append(f"| {net} | {value:g} | " + " | ".join("" if c is None else f"{c:.3g}" for c in cells) + " |")
    return [*lines, ""]


def draw(records: Records, path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(18, 10), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(3, len(STUDIES), sharex="col", sharey="row")
    colours = colormaps["viridis"]([0.0, 0.35, 0.65, 0.9])
    for column, (study, title) in enumerate(STUDIES.items()):
        own = [r for r in records if r["study"] == study]
        if study == "stages":
            lines = [("trained", 0, "black", "trained, whole net"), ("fresh", 0, "silver", "fresh, whole net")]
            lines += [("trained", 1, colours[0], "trained, stage 1"), ("fresh", 1, "grey", "fresh, stage 1")]
        else:
            lines = [("trained", n, colours[n - 1], f"trained, stage {n}") for n in (1, 2, 3, 4)]
            other = "smooth" if study == "share of motion" else "fresh"
            lines += [(other, 1, "crimson" if other == "smooth" else "grey", f"{other}, stage 1")]
        for net, stage, colour, label in lines:
            for axes, name in zip(grid[:, column], ("cosine", "norm_ratio", "error"), strict=True):
                x, y = curve(own, name, net=net, stage=stage)
                shown = [(a, b) for a, b in zip(x, y, strict=True) if name == "cosine" or b > 0]  # the others are logs
                axes.plot(*zip(*shown, strict=True), marker=".", color=colour, label=label)
            if stage == 1:
                for name, style in (("bound", "--"), ("motion_bound", ":")):
                    x, y = curve([r for r in own if r.get(name)], name, net=net, stage=stage)
                    grid[2, column].plot(x, y, linestyle=style, color=colour, linewidth=1)
        grid[0, column].set_title(title, fontsize="medium")
        grid[0, column].axhline(0, color="lightgrey", linewidth=0.8, zorder=0)
        grid[1, column].axhline(1, color="lightgrey", linewidth=0.8, zorder=0)
        grid[2, column].axhline(1, color="lightgrey", linewidth=0.8, zorder=0)
        grid[2, column].set_xlabel(study)
        for axes in grid[:, column]:
            axes.grid(alpha=0.2)
        if study in ("frame step", "share of motion"):
            grid[0, column].set_xscale("log", base=2 if study == "frame step" else 10)
        elif study == "learning rate":
            grid[0, column].set_xscale("symlog", linthresh=1e-4)
            grid[0, column].set_xlim(left=-2e-5)
        grid[0, column].legend(fontsize="x-small", loc="lower left")
    grid[0, 0].set_ylabel("cosine with the true gradient")
    grid[1, 0].set_ylabel("norm / true norm")
    grid[1, 0].set(yscale="log", ylim=(0.1, 100))
    grid[2, 0].set_ylabel("error / true norm\n(stage 1 dashed: bound, dotted: motion bound)")
    grid[2, 0].set(yscale="log")
    grid[2, 0].set_ylim(1e-5, 1e4)
    with write_beside(path) as part:
        figure.savefig(part, format="png", dpi=80)


if __name__ == "__main__":
    write_all(Path(sys.argv[1]), Path(sys.argv[1]).parent)
