"""``curve.png``: loss and accuracy over the epochs of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sidestream.report import write_beside

log = logging.getLogger("sidestream.train")


def draw_curve(epochs: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> bool:
    """Draw what the log says of each epoch; False, with a warning, where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("no %s: matplotlib is not installed (pip install 'sidestream[plot]')", path.name)
        return False
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracies = figure.subplots(1, 2)
    for axes, what in ((losses, "loss"), (accuracies, "accuracy")):
        for part in ("train", "test"):
            points = [(r["epoch"] + 1, r[f"{part}_{what}"]) for r in epochs if r.get(f"{part}_{what}") is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=part)
                axes.legend()
        axes.set_xlabel("epoch")
        axes.set_ylabel(what)
    accuracies.set_ylim(0, 1)
    figure.suptitle(title)
    with write_beside(path) as part_path:
        figure.savefig(part_path, format="png", dpi=100)
    return True
