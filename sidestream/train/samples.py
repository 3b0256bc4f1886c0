"""``samples.png``: what a trained net draws, or where it finds the keypoints, on a few clips."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from sidestream.report import write_beside
from sidestream.train.tasks import Panel

PANEL_INCHES = 1.7
MARKERS = {"true": ("o", "lime"), "answer": ("x", "red")}

log = logging.getLogger("sidestream.train")


def draw_samples(rows: Mapping[str, Sequence[Panel]], path: Path, *, title: str) -> bool:
    """Draw a row of pictures per name; False, with a warning, where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("no %s: matplotlib is not installed (pip install 'sidestream[plot]')", path.name)
        return False
    num_columns = max(len(panels) for panels in rows.values())
    size = PANEL_INCHES * num_columns + 0.5, PANEL_INCHES * len(rows) + 0.6
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), num_columns, squeeze=False)
    for line, (name, panels) in zip(grid, rows.items(), strict=True):
        for axes in line:
            axes.set_xticks([])
            axes.set_yticks([])
        for axes, panel in zip(line, panels, strict=False):
            height, width = panel.pixels_CHW.shape[-2:]
            axes.imshow(panel.pixels_CHW.permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
            for label, points_P2 in panel.points:
                marker, colour = MARKERS[label]
                axes.scatter(*points_P2.T.numpy(), s=14, marker=marker, color=colour, linewidths=1, label=label)
                axes.set_xlim(0, width)
                axes.set_ylim(height, 0)
        line[0].set_ylabel(name)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    figure.suptitle(title)
    with write_beside(path) as part_path:
        figure.savefig(part_path, format="png", dpi=100)
    return True
