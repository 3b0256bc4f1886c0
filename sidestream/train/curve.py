"""``curve.png``: loss and score (accuracy, PSNR, PCK) over the epochs of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sidestream.report import write_beside

UNITS = {"psnr": "PSNR (dB)", "pck_0.2": "PCK@0.2"}

log = logging.getLogger("sidestream.train")


def draw_curve(epochs: Sequence[Mapping[str, Any]], path: Path, *, title: str, score: str = "accuracy") -> bool:
    """Draw what the log says of each epoch, and of answers that need no net.

    False, with a warning, where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("no %s: matplotlib is not installed (pip install 'sidestream[plot]')", path.name)
        return False
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, scores = figure.subplots(1, 2)
    for axes, what in ((losses, "loss"), (scores, score)):
        for part in ("train", "test"):
            points = [(r["epoch"] + 1, r[f"{part}_{what}"]) for r in epochs if r.get(f"{part}_{what}") is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=part)
                axes.legend()
        axes.set_xlabel("epoch")
        axes.set_ylabel(UNITS.get(what, what))
    for name, value in _baselines(epochs, score).items():
        scores.axhline(value, linestyle=":", color="grey")
        scores.annotate(name, (0.02, value), xycoords=("axes fraction", "data"), va="bottom", color="grey")
    if score != "psnr":
        scores.set_ylim(0, 1)
    figure.suptitle(title)
    with write_beside(path) as part_path:
        figure.savefig(part_path, format="png", dpi=100)
    return True


def _baselines(epochs: Sequence[Mapping[str, Any]], score: str) -> dict[str, float]:
    """Of the last epoch that was evaluated: what answers that need no net come to."""
    last: Mapping[str, Any] = next((r for r in reversed(epochs) if f"test_{score}" in r), {})
    names = [key for key in last if key.startswith("test_") and key.endswith(f"_{score}") and key != f"test_{score}"]
    return {n.removeprefix("test_").removesuffix(f"_{score}").replace("_", " "): float(last[n]) for n in names}
