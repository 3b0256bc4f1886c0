"""memory.png, schedule.png, gradients.png and, where speed was measured, speed.png."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from table import MIB, Records, distinct, of, per_stage

from sidestream.report.record import write_beside

COLOURS = {
    "backprop": "#555555",
    "bptt": "#8c8c8c",
    "gpipe": "#4c72b0",
    "gpipe, recomputing": "#8fb1dd",
    "1f1b": "#55a868",
    "1f1b, recomputing": "#9fd3ae",
    "sideways": "#dd8452",
    "skip-sideways": "#c44e52",
}


def draw_all(records: Records, folder: Path) -> None:
    for part, draw in (("memory", memory), ("schedule", schedule), ("gradients", gradients), ("speed", speed)):
        if some := of(records, part):
            draw(some, folder / f"{part}.png")


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    with write_beside(path) as part:
        figure.savefig(part, format="png", dpi=110)


def memory(records: Records, path: Path) -> None:
    """Left: against the clip's length, at the depth with most lengths; right: against depth."""
    depth = _commonest(records, "num_stages")
    length = _commonest(records, "num_frames")
    figure = _figure(11, 4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, fixed, value, moving, title in (
        (left, "num_stages", depth, "num_frames", f"{depth} stages: frames of the clip"),
        (right, "num_frames", length, "num_stages", f"{length} frames: number of stages"),
    ):
        some = of(records, "memory", **{fixed: value})
        for method in distinct(some, "method"):
            points = sorted((r["case"][moving], r["activation_bytes"] / MIB) for r in of(some, "memory", method=method))
            axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=method, color=COLOURS[method])
        ticks = sorted(distinct(some, moving))
        axes.set(xscale="log", yscale="log", xlabel=title)
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.set_ylabel("activations of all stages (MiB)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    _save(figure, path)


def _commonest(records: Records, name: str) -> Any:
    return statistics.mode(r["case"][name] for r in records)


def schedule(records: Records, path: Path) -> None:
    """Who works when, as it was counted; forward light, backward dark, white is idle."""
    some = [r for r in records if "slots" in r and r["case"]["num_stages"] == 4] or [r for r in records if "slots" in r]
    if not some:
        return
    figure = _figure(10, 1.15 * len(some))
    longest = max(r["num_slots"] for r in some if r["case"]["method"] not in ("backprop", "bptt"))
    for axes, r in zip(figure.subplots(len(some), 1, squeeze=False)[:, 0], some, strict=True):
        K = r["case"]["num_stages"]
        for slot, n, back in r["slots"]:
            if slot < longest:
                colour = COLOURS[r["case"]["method"]]
                axes.add_patch(_box(slot, n, colour, alpha=1.0 if back else 0.45))
        axes.set(xlim=(0, longest), ylim=(K, 0), yticks=[k + 0.5 for k in range(K)], xticks=[])
        axes.set_yticklabels([str(k + 1) for k in range(K)], fontsize=7)
        more = ", goes on" if r["num_slots"] > longest else ""
        title = f"{r['case']['method']}: idle {100 * r['idle_share']:.0f} % of {r['num_slots']} slots{more}"
        axes.set_title(title, fontsize=9, loc="left", pad=2)
    axes.set_xlabel(
        f"slots: one forward (light) or backward (dark) of one stage; {some[0]['case']['num_frames']} frames"
    )
    _save(figure, path)


def _box(x: float, y: float, colour: str, *, alpha: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x + 0.05, y + 0.05), 0.9, 0.9, color=colour, alpha=alpha, lw=0)


def gradients(records: Records, path: Path) -> None:
    """Sideways: error of each stage's gradient against the true one of the same frames, median over the clips."""
    some = [r for r in records if r["case"]["rule"] == "sideways"]
    depths = distinct(some, "num_stages")
    figure = _figure(5 * len(depths), 4)
    for axes, K in zip(figure.subplots(1, len(depths), squeeze=False, sharey=True)[0], depths, strict=True):
        here = [r for r in some if r["case"]["num_stages"] == K]
        for n, step in enumerate(distinct(here, "step")):
            for style, weights in (("-", "random"), ("--", "trained")):
                for r in of(here, "gradients", step=step, weights=weights):
                    label = f"{'still' if step == 'still' else f'every {_nth(step)}frame'}, {weights} weights"
                    errors = per_stage(r, "same_frames", "relative_error")
                    axes.plot(range(1, K + 1), errors, style, marker="o", ms=4, color=f"C{n}", label=label)
        axes.set(yscale="log", xlabel=f"stage, of {K}", title=f"{K} stages", xticks=range(1, K + 1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("relative error of the gradient")
    _save(figure, path)


def _nth(step: int) -> str:
    return "" if step == 1 else {2: "2nd ", 4: "4th "}.get(step, f"{step}th ")


def speed(records: Records, path: Path) -> None:
    nets = distinct(records, "net")
    figure = _figure(6.2 * len(nets), 0.34 * len(distinct(records, "method")) + 1.2)
    for axes, net in zip(figure.subplots(1, len(nets), squeeze=False)[0], nets, strict=True):
        rows = sorted(of(records, "speed", net=net), key=lambda r: statistics.median(r["ratios"]))
        middle = [statistics.median(r["ratios"]) for r in rows]
        ends = [[m - min(r["ratios"]) for m, r in zip(middle, rows, strict=True)]]
        ends += [[max(r["ratios"]) - m for m, r in zip(middle, rows, strict=True)]]
        axes.barh(range(len(rows)), middle, xerr=ends, color=[_colour(r) for r in rows], error_kw={"lw": 0.8})
        axes.set_yticks(range(len(rows)), [r["case"]["method"] for r in rows], fontsize=8)
        axes.set(xlabel="speed, ratio to backprop on 1 thread", title=net)
        axes.axvline(1, color="black", lw=0.6)
    _save(figure, path)


def _colour(record: dict[str, Any]) -> str:
    words: Sequence[tuple[str, str]] = (
        ("torch", "#4c72b0"),
        ("Sideways", COLOURS["sideways"]),
        ("1F1B", COLOURS["1f1b"]),
        ("GPipe", "#8172b3"),
    )
    return next((colour for word, colour in words if word in record["case"]["method"]), COLOURS["bptt"])
