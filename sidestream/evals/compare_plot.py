"""The picture of a comparison: latency, throughput and memory per model, and training memory against clip length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sidestream.errors import MissingExtraError
from sidestream.evals.compare_table import Figures
from sidestream.evals.compare_talk import FAMILIES
from sidestream.report.record import write_beside

COLOURS = {
    "frame": "#4c72b0",
    "rnn": "#55a868",
    "conv3d": "#c44e52",
    "transformer": "#8172b3",
    "temporal2d": "#dd8452",
    "other": "#8c8c8c",
}
_MARKERS = "osD^vP*X"


def draw(found: Sequence[Figures], num_frames: int, path: Path) -> None:
    """Write the picture to ``path`` (PNG). Raises ``MissingExtraError`` without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "the picture of a comparison") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 4.0 + 0.45 * len(found)), layout="constrained")
    _bars(axes[0, 0], found, [_times(f, "latency_seconds", 1e3) for f in found])
    axes[0, 0].set_xlabel("from the newest frame to the answer, ms (delay of look-ahead not in it)")
    _bars(axes[0, 1], found, [_times(f, "frames_per_second", 1.0) for f in found])
    axes[0, 1].set_xlabel("frames per second of one stream")
    _bars(axes[1, 0], found, [_memory(f, num_frames) for f in found])
    axes[1, 0].set_xlabel(f"peak memory at test on a stream, MiB beyond the parameters ({num_frames} frames)")
    _training(axes[1, 1], found)
    shown = [family for family in COLOURS if any(f.family == family for f in found)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[family], label=FAMILIES[family]) for family in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    with write_beside(path) as part:
        figure.savefig(part, format="png", dpi=110)
    plt.close(figure)


def _times(f: Figures, name: str, scale: float) -> list[float]:
    return [r[name] * scale for r in f.speed]


def _memory(f: Figures, num_frames: int) -> list[float]:
    peak = f.peak_bytes("stream", num_frames)
    return [] if peak is None else [peak / 2**20]


def _bars(axis: Any, found: Sequence[Figures], values: Sequence[Sequence[float]]) -> None:
    """A bar to the median, a line from least to greatest, the value at its end; none where nothing was measured."""
    import statistics

    for row, (f, some) in enumerate(zip(found, values, strict=True)):
        if some:
            middle = statistics.median(some)
            axis.barh(row, middle, color=COLOURS[f.family])
            axis.plot([min(some), max(some)], [row, row], color="black", linewidth=1)
            axis.annotate(
                f" {_short(middle)}",
                (max(some), row),
                xytext=(2, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
    axis.set_yticks(range(len(found)), [f.model for f in found], fontsize=8)
    axis.set_ylim(len(found) - 0.4, -0.6)
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)


def _training(axis: Any, found: Sequence[Figures]) -> None:
    """A line per model, its family's colour."""
    seen: dict[str, int] = {}
    for f in found:
        points = sorted(
            (n, r["peak_bytes"] / 2**20) for (work, n), r in f.memory.items() if "peak_bytes" in r and work == "train"
        )
        if points:
            marker = _MARKERS[seen.get(f.family, 0) % len(_MARKERS)]
            seen[f.family] = seen.get(f.family, 0) + 1
            axis.plot(*zip(*points, strict=True), color=COLOURS[f.family], marker=marker, markersize=5, label=f.model)
    if seen:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        ticks = sorted({n for f in found for work, n in f.memory if work == "train"})
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axis.set_xlabel("frames of a clip")
    axis.set_ylabel("training step, peak MiB beyond the parameters", fontsize=8)
    axis.grid(alpha=0.3)


def _short(value: float) -> str:
    """Three digits, and no powers of ten."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
