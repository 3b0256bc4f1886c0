"""The diagnostics of a run: a few clips of a batch, one record per stage, and ``diagnostics.png`` at the end."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sidestream.report import write_beside
from sidestream.train.gradient_error import GradientError

NUM_CLIPS = 2
"""Of a batch that is diagnosed: its first ones."""

log = logging.getLogger("sidestream.train")


def stage_records(frozen: Sequence[GradientError], moving: Sequence[GradientError] = ()) -> list[dict[str, Any]]:
    """One plain record per stage, over its ticks; None where there is nothing to say.

    ``error``, ``bound`` and ``motion_bound`` are means divided by the mean length of the true gradients, so that
    error <= bound <= motion_bound in every record. ``moving``: of the same clips while the weights change.
    """
    records = []
    for stage in sorted({e.stage for e in frozen}):
        own = [e for e in frozen if e.stage == stage]
        record: dict[str, Any] = {"stage": stage, "num_ticks": len(own), "age_gap": own[0].age_gap}
        record |= {"motion": _mean(e.motion for e in own), **_summary(own)}
        record |= {name: _relative(own, name) for name in ("bound", "motion_bound")}
        if changing := [e for e in moving if e.stage == stage]:
            record |= {f"moving_{name}": value for name, value in _summary(changing).items()}
            record["weight_change"] = _mean(e.weight_change for e in changing)
        else:
            record["weight_change"] = 0.0
        records.append(record)
    return records


def _summary(errors: Sequence[GradientError]) -> dict[str, float | None]:
    return {
        "cosine": _mean(e.cosine for e in errors),
        "cosine_median": _of_finite(statistics.median, (e.cosine for e in errors)),
        "norm_ratio": _mean(e.norm_ratio for e in errors),
        "error": _relative(errors, "error"),
    }


def _relative(errors: Sequence[GradientError], name: str) -> float | None:
    values = [getattr(e, name) for e in errors]
    true = sum(e.true_norm for e in errors)
    return None if None in values or not true or not math.isfinite(sum(values)) else sum(values) / true


def _mean(values: Iterable[float]) -> float | None:
    return _of_finite(statistics.fmean, values)


def _of_finite(function: Callable[[list[float]], float], values: Iterable[float]) -> float | None:
    finite = [v for v in values if math.isfinite(v)]
    return function(finite) if finite else None


def draw_diagnostics(records: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> bool:
    """Cosine of every stage over the run, and error and bound against motion; False, with a warning, where matplotlib
    is not installed or there is no record."""
    if not records:
        log.warning("no %s: no batch was diagnosed", path.name)
        return False
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("no %s: matplotlib is not installed (pip install 'sidestream[plot]')", path.name)
        return False
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    over_time, over_motion = figure.subplots(1, 2)
    stages = sorted({r["stage"] for r in records})
    for stage, colour in zip(stages, colormaps["viridis"]([n / len(stages) for n in range(len(stages))]), strict=True):
        own = [r for r in records if r["stage"] == stage]
        x, y = _points(own, "num_updates", "cosine")
        over_time.plot(x, y, marker=".", color=colour, label=f"stage {stage}, gap {own[0]['age_gap']}")
        x, y = _points(own, "num_updates", "moving_cosine")
        over_time.plot(x, y, linestyle=":", color=colour)
        over_motion.plot(*_points(own, "motion", "error"), ".", color=colour)
        over_motion.plot(*_points(own, "motion", "bound"), "_", color=colour)
    over_time.set(xlabel="updates", ylabel="cosine with the true gradient", ylim=(None, 1.02))
    if any("moving_cosine" in r for r in records):
        over_time.set_title("dotted: while the weights change", fontsize="medium")
    over_time.axhline(0, color="grey", linewidth=0.5)
    over_time.legend(fontsize="small")
    over_motion.set(xlabel="mean absolute difference of the frames", ylabel="error / length of the true gradient")
    over_motion.set_title("dots: measured, dashes: bound", fontsize="medium")
    if any(r["error"] for r in records if r["motion"]):
        over_motion.set(xscale="log", yscale="log")
    figure.suptitle(title)
    with write_beside(path) as part:
        figure.savefig(part, format="png", dpi=100)
    return True


def _points(records: Sequence[Mapping[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    known = [(r[x], r[y]) for r in records if r.get(x) is not None and r.get(y) is not None]
    return [p[0] for p in known], [p[1] for p in known]
