"""table.md and diffusion.png from results.jsonl."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

from sidestream.report import markdown_table, percentiles, read_json_lines, write_beside, write_text

BIN = 0.25  # decades
COLOURS = {2: "tab:green", 4: "tab:blue", 8: "tab:orange", 16: "tab:red"}
MARKERS = {1: "o", 2: "^", 4: "s"}
NAMES = {"sinusoids": "sinusoids, tanh MLP", "shapes": "moving shapes, conv net"}
Records = list[dict[str, Any]]


def write_all(results: Path, folder: Path) -> None:
    records = read_json_lines(results)
    text = "\n\n".join(part for kind in NAMES for part in (f"### {NAMES[kind]}", *_tables(records, kind))) + "\n"
    write_text(folder / "table.md", text)
    print(text)
    draw(records, folder / "diffusion.png")


def _where(records: Records, **wanted: Any) -> Records:
    return [r for r in records if all(r["case"][k] == v for k, v in wanted.items())]


def _values(records: Records, name: str) -> list[Any]:
    return sorted({r["case"][name] for r in records})


def points(records: Records, kind: str) -> list[dict[str, float]]:
    """One per net, speed and layer that has a gap: medians over seeds."""
    groups: dict[tuple[float, int, int], Records] = defaultdict(list)
    for r in _where(records, kind=kind):
        groups[r["case"]["speed"], r["case"]["depth"], r["case"]["tau"]].append(r)
    found = []
    for (_, depth, tau), some in groups.items():
        change = median(r["change_per_tick"] for r in some)
        for n, gap in enumerate(some[0]["gap_ticks"]):
            if gap:
                point = {name: median(r[name][n] for r in some) for name in ("cosine", "norm_ratio", "error")}
                found.append(point | {"change": change, "gap": gap, "depth": depth, "tau": tau})
    return found


def off_a_common_curve(xs: list[float], errors: list[float]) -> float:
    """The factor by which errors lie off the median of their bin of x, of a quarter of a decade (rms of log)."""
    bins: dict[int, list[float]] = defaultdict(list)
    for x, error in zip(xs, errors, strict=True):
        bins[math.floor(math.log10(x) / BIN)].append(math.log10(error))
    off = [value - median(some) for some in bins.values() for value in some]
    return 10 ** math.sqrt(sum(d * d for d in off) / len(off))


def _tables(records: Records, kind: str) -> list[str]:
    some = _where(records, kind=kind, tau=1)
    depths, speeds = _values(some, "depth"), _values(some, "speed")
    rows = []
    for speed in speeds:
        cells = []
        for depth in depths:
            of_first = [r["cosine"][0] for r in _where(some, speed=speed, depth=depth)]
            low, mid, high = percentiles(of_first, (0, 50, 100))
            cells.append(f"{mid:.3f} ({low:.3f} to {high:.3f})")
        change = median(r["change_per_tick"] for r in _where(some, speed=speed))
        rows.append([f"{speed:g}", f"{change:.4f}", *cells])
    first = markdown_table(["speed", "change per tick", *[f"K = {d}" for d in depths]], rows)
    near = [p for p in points(records, kind) if p["change"] * p["gap"] <= 1]
    errors = [p["error"] for p in near]
    xs = {
        "change per tick": [p["change"] for p in near],
        "change x depth x tau": [p["change"] * p["depth"] * p["tau"] for p in near],
        "change x gap": [p["change"] * p["gap"] for p in near],
    }
    lines = [[name, f"{off_a_common_curve(x, errors):.2f}"] for name, x in xs.items()]
    second = markdown_table(["against", "errors lie off one curve by a factor of"], lines)
    small = [p for p in near if p["change"] * p["gap"] <= 0.3]
    logs = [[math.log(p["change"] * p["gap"]) for p in small], [math.log(p["error"]) for p in small]]
    ends = percentiles([p["error"] / (p["change"] * p["gap"]) for p in small], (10, 50, 90))
    law = (
        f"Up to change x gap = 0.3 the relative error goes with its power {linear_regression(*logs).slope:.2f} (least "
        f"squares on logs), and is {ends[1]:.2f} times it ({ends[0]:.2f} to {ends[2]:.2f}: 10 to 90 % of points)."
    )
    steps = []
    for low, high in ((0, 0.03), (0.03, 0.1), (0.1, 0.3), (0.3, 1), (1, 3), (3, math.inf)):
        inside = [p for p in points(records, kind) if low <= p["change"] * p["gap"] < high]
        if inside:
            row = [f"{low:g} to {high:g}", len(inside)]
            for name in ("cosine", "norm_ratio", "error"):
                ends = percentiles([p[name] for p in inside], (10, 50, 90))
                row.append(f"{ends[1]:.3f} ({ends[0]:.3f} to {ends[2]:.3f})")
            steps.append(row)
    third = markdown_table(["change x gap", "points", "cosine", "norm ratio", "relative error"], steps)
    return [
        "Cosine at the first layer, median of seeds (least to most):\n\n" + first,
        "Does the error fall on one curve (points with change x gap up to 1)?\n\n" + second,
        law,
        "All layers with a gap, median (10 to 90 %):\n\n" + third,
    ]


def draw(records: Records, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, kind in zip(figure.subplots(2, 3), NAMES, strict=True):
        _draw_first_layer(axes[0], _where(records, kind=kind, tau=1))
        _draw_points(axes[1], points(records, kind), "error", "relative error |pseudo - true| / |true|")
        _draw_points(axes[2], points(records, kind), "norm_ratio", "norm ratio |pseudo| / |true|")
        axes[0].set_title(f"{NAMES[kind]}: the first layer")
        axes[1].set_title(f"{NAMES[kind]}: all layers")
        axes[2].set_title(f"{NAMES[kind]}: all layers")
        axes[1].set(yscale="log")
        axes[2].set_ylim(0, 1.3)
        axes[2].axhline(1, color="black", linewidth=0.8)
    with write_beside(path) as part:
        figure.savefig(part, format="png", dpi=100)


def _draw_first_layer(axes: Any, records: Records) -> None:
    for depth in _values(records, "depth"):
        xs, mids, lows, highs = [], [], [], []
        for speed in _values(records, "speed"):
            some = _where(records, depth=depth, speed=speed)
            low, mid, high = percentiles([r["cosine"][0] for r in some], (0, 50, 100))
            xs.append(median(r["change_per_tick"] for r in some))
            mids.append(mid), lows.append(low), highs.append(high)
        axes.plot(xs, mids, marker="o", color=COLOURS[depth], label=f"K = {depth}")
        axes.fill_between(xs, lows, highs, color=COLOURS[depth], alpha=0.15, linewidth=0)
    axes.set(xscale="log", xlabel="input change per tick (relative rms)", ylabel="cosine to backprop's gradient")
    axes.grid(alpha=0.3)
    axes.legend(title="median, range of seeds", fontsize=9)


def _draw_points(axes: Any, found: list[dict[str, float]], name: str, label: str) -> None:
    for depth in sorted({p["depth"] for p in found}):
        for tau in sorted({p["tau"] for p in found}):
            some = [p for p in found if (p["depth"], p["tau"]) == (depth, tau)]
            if some:
                axes.scatter(
                    [p["change"] * p["gap"] for p in some],
                    [p[name] for p in some],
                    s=18,
                    marker=MARKERS[tau],
                    color=COLOURS[depth],
                    alpha=0.6,
                    linewidth=0,
                    label=f"K = {depth}" + (f", tau = {tau}" if tau > 1 else ""),
                )
    axes.set(xscale="log", xlabel="input change per tick x gap in ticks", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
