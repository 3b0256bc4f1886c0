"""The picture of ``inception_keypoints.py``: accuracy against depth-parallelism."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sidestream.report.record import write_beside

COLOURS = {"predictive": "C0", "not predictive": "C3"}


def draw(
    named: Mapping[str, Mapping[int, Sequence[float]]],
    mean_pose: Sequence[float],
    wirings: Mapping[int, str],
    path: Path,
) -> None:
    """``named``: line -> lag -> PCK@0.2 of each seed. Lines are means; whiskers go from the least to the greatest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4.4))
    places = {lag: place for place, lag in enumerate(wirings)}
    for name, colour in COLOURS.items():
        line: dict[int, list[float]] = {lag: [100 * v for v in found] for lag, found in named[name].items() if found}
        means = [statistics.mean(v) for v in line.values()]
        ranges: Any = [
            [mean - min(v) for mean, v in zip(means, line.values(), strict=True)],
            [max(v) - mean for mean, v in zip(means, line.values(), strict=True)],
        ]
        axis.errorbar([places[n] for n in line], means, yerr=ranges, marker="o", capsize=3, color=colour, label=name)
    if ceiling := named["predictive"].get(0):
        axis.axhline(100 * statistics.mean(ceiling), color="k", linestyle="--", label="offline: no lateness")
    if mean_pose:
        axis.axhline(100 * mean_pose[0], color="0.5", linestyle=":", label="mean pose")
    labels = [f"{lag + 1}\n{lag} late" for lag in places]
    axis.set_xticks(list(places.values()), labels)
    axis.set(
        xlabel="groups of stages that work in parallel; ticks", ylabel="PCK@0.2 on the newest frame, %", ylim=(0, None)
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    with write_beside(path) as part:
        figure.savefig(part, dpi=110, format="png")
    plt.close(figure)
