"""streaming.png: accuracy against frame rate, and the share that is kept, against rate, motion and speed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from table import CENTRE, STUDIES, Point, gaps, kept

from sidestream.report.record import write_beside

STYLES = {
    "sequential": ("#c44e52", "-"),
    "pipelined": ("#dd8452", "-"),
    "two groups": ("#4c72b0", "-"),
    "parallel": ("#55a868", "-"),
    "sequential, forecast": ("#c44e52", "--"),
    "pipelined, forecast": ("#dd8452", "--"),
}
"""Net -> colour and line."""
TITLES = {
    "frame rate": "JHMDB, against frame rate",
    "motion": "JHMDB, against motion",
    "speed": "moving shapes, against speed",
    CENTRE: "moving shapes, the centre alone",
}


def draw(points: Mapping[str, Mapping[float, Point]], path: Path) -> None:
    """Means over the seeds, and their range as a band; dotted: the sequential net offline. No records, no panel."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 9.2))
    accuracy, *others, last = axes.flat
    panels = dict(zip(STUDIES, others, strict=True))
    rates = points["frame rate"]
    for net in STYLES:
        _line(accuracy, net, rates, {x: [100 * live for live, _ in p.get(net, {}).values()] for x, p in rates.items()})
    offline = {x: [100 * off for _, off in p.get("sequential", {}).values()] for x, p in rates.items()}
    if means := {x: statistics.mean(values) for x, values in offline.items() if values}:
        accuracy.plot(list(means), list(means.values()), ":", color="black", label="sequential, offline")
    accuracy.set(ylabel="PCK@0.2 on the newest frame, %", xlabel=STUDIES["frame rate"], title="JHMDB, accuracy live")
    for study, axis in panels.items():
        some = points[study]
        for net in STYLES:
            _line(axis, net, some, {x: [100 * share for share in kept(p, net)] for x, p in some.items()})
        ylabel = "share of the sequential net's offline accuracy, %"
        axis.set(xlabel=STUDIES[study], ylabel=ylabel, title=TITLES[study])
        axis.axhline(100, color="black", lw=0.8, ls=":")
        if study in ("speed", CENTRE) and some:
            axis.set_xscale("log", base=2)
        axis.set_xticks(list(some), [f"{x:g}" for x in some])
    for studies in ([study for study in STUDIES if study != CENTRE], [CENTRE]):
        _name_the_gap(panels, {study: points[study] for study in studies})
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for axis, some in ((accuracy, rates), *((panels[study], points[study]) for study in panels)):
        axis.set_visible(bool(some))
    last.set_axis_off()
    named = {name: line for axis in axes.flat for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    if named:
        last.legend([*named.values()], [*named], loc="center", title="net (seeds)")
    figure.tight_layout()
    with write_beside(path) as part:
        figure.savefig(part, dpi=110, format="png")
    plt.close(figure)


def _line(axis: Any, net: str, points: Mapping[float, Point], values: Mapping[float, Sequence[float]]) -> None:
    some = {x: v for x, v in values.items() if v}
    if not some:
        return
    color, style = STYLES[net]
    num_seeds = max(len(v) for v in some.values())
    means = [statistics.mean(v) for v in some.values()]
    axis.plot(list(some), means, style, color=color, marker="o", ms=4, label=f"{net} ({num_seeds})")
    ends = [min(v) for v in some.values()], [max(v) for v in some.values()]
    axis.fill_between(list(some), *ends, color=color, alpha=0.12)


def _name_the_gap(panels: Mapping[str, Any], points: Mapping[str, Mapping[float, Point]]) -> None:
    if not (found := gaps(points, forecasts=False)):
        return
    ratio, study, x, best, rival = found[0]
    axis = panels[study]
    ends = [100 * statistics.mean(kept(points[study][x], net)) for net in (rival, best)]
    axis.annotate("", xy=(x, ends[1]), xytext=(x, ends[0]), arrowprops={"arrowstyle": "<->", "lw": 1.2})
    axis.annotate(f" {ratio:.2f} x", xy=(x, sum(ends) / 2), fontsize=9, ha="right")
