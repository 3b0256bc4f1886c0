"""What the records of ``live.py`` say: a table, and a picture; and a table of those of ``control.py``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sidestream.report.measure import percentiles
from sidestream.report.record import write_beside
from sidestream.report.table import markdown_table

Record = Mapping[str, Any]
BASELINE = "sequential, 2 threads"
"""The usual way to use all cores; differences are from it."""
HEADER = (
    "camera, frames/s",
    "net",
    "PCK@0.2 offline, %",
    "live, %",
    "kept, %",
    "against baseline",
    "dropped, %",
    "answers/s",
    "latency p50 / p95, ms",
    "reaction p50 / p95, ms",
    "ticks",
    "frames behind",
    "workers busy, %",
    "cores, own / others (with the lead-in)",
)


def live_table(records: Sequence[Record]) -> str:
    """Markdown: a row per rate and net, over all clips that were measured."""
    has_gpu = any("sm_activity" in r for r in records)
    header = (*HEADER, "SM activity, % (with the lead-in)") if has_gpu else HEADER
    lines = ["| " + " | ".join(header) + " |", "| ---: | --- |" + " ---: |" * (len(header) - 2)]
    for rate in rates_of(records):
        nets = by_net(records, rate)
        for net, own in nets.items():
            cells = [f"{rate:g}", net, *row(own, nets.get(BASELINE, []))]
            shares = [r["sm_activity"] for r in own if r.get("sm_activity") is not None]
            cells += [f"{100 * statistics.mean(shares):.0f}" if shares else "-"] if has_gpu else []
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def row(own: Sequence[Record], baseline: Sequence[Record]) -> list[str]:
    offline, live = share(own, "right_offline"), share(own, "right")
    latency, reaction = (percentiles(all_of(own, name)) for name in ("latency_ms", "reaction_ms"))
    return [
        f"{100 * offline:.1f}",
        f"{100 * live:.1f}",
        f"{100 * live / offline:.0f}" if offline else "",
        "" if own is baseline or not baseline else difference(own, baseline),
        f"{100 * total(own, 'num_dropped') / total(own, 'num_frames'):.0f}",
        f"{answers_per_second(own):.1f}",
        f"{latency[0]:.0f} / {latency[1]:.0f}",
        f"{reaction[0]:.0f} / {reaction[1]:.0f}",
        str(own[0]["reaction_ticks"]),
        f"{total(own, 'mismatch') / max(1, total(own, 'num_paired')):.2f}",
        ", ".join(f"{100 * busy:.0f}" for busy in mean_busy(own)),
        " / ".join(f"{statistics.mean(r[name] for r in own):.2f}" for name in ("our_cores", "others_cores")),
    ]


def difference(own: Sequence[Record], baseline: Sequence[Record]) -> str:
    """Live PCK less that of the baseline, in points of percent: mean over the clips that both saw ± standard error."""
    other = {r["case"]["clip"]: r for r in baseline}
    pairs = [(r, other[r["case"]["clip"]]) for r in own if r["case"]["clip"] in other]
    gaps = [100 * (share([a], "right") - share([b], "right")) for a, b in pairs]
    return with_error(gaps)


def with_error(gaps: Sequence[float]) -> str:
    """Mean ± standard error."""
    if len(gaps) < 2:
        return f"{gaps[0]:+.1f}" if gaps else ""
    return f"{statistics.mean(gaps):+.1f} ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.1f}"


def answers_per_second(own: Sequence[Record]) -> float:
    """Answers over the time from each clip's first frame until the last answer was ready."""
    return total(own, "num_answers") / max(1e-9, total(own, "last_ready_seconds"))


def mean_busy(own: Sequence[Record]) -> list[float]:
    """Per worker, the busiest first; clips count by how long they lasted."""
    weights = [max(1e-9, r["last_ready_seconds"]) for r in own]  # 0 of a clip without any answer
    columns = zip(*(r["busy_shares"] for r in own), strict=True)
    return [sum(w * share for w, share in zip(weights, column, strict=True)) / sum(weights) for column in columns]


def share(own: Sequence[Record], name: str) -> float:
    return total(own, name) / max(1, total(own, "num_points"))


def total(own: Sequence[Record], name: str) -> float:
    return sum(r[name] for r in own)


def all_of(own: Sequence[Record], name: str) -> list[float]:
    return [value for r in own for value in r[name]]


def ceiling(own: Sequence[Record], baseline: Sequence[Record]) -> float | None:
    """What the baseline has offline on the same clips; None where it did not see all of them."""
    clips = {r["case"]["clip"] for r in own}
    same = [r for r in baseline if r["case"]["clip"] in clips]
    return share(same, "right_offline") if len(same) == len(clips) else None


def rates_of(records: Sequence[Record]) -> list[float]:
    return sorted({r["case"]["rate"] for r in records})


def by_net(records: Sequence[Record], rate: float) -> dict[str, list[Record]]:
    """In the order in which they were measured, those in sequence first."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["case"]["rate"] == rate:
            found.setdefault(record["case"]["net"], []).append(record)
    return dict(sorted(found.items(), key=lambda item: not item[0].startswith("sequential")))


CONTROLS = (
    ("all frames fed, own answer", "all", None),
    ("every third fed, own answer", "thinned", "all"),
    ("all fed, own answer, from frame 6 on", "all, from frame 6", None),
    ("the same, answer 3 frames late", "3 late", "all, from frame 6"),
    ("the same, answer 5 frames late", "5 late", "all, from frame 6"),
)
"""In words, in the records, and what it is compared with."""


def control_table(records: Sequence[Record]) -> str:
    """Markdown: of all clips together, and the mean of the differences within a clip."""

    def shares(name: str) -> list[float]:
        return [100 * r["right"][name] / max(1, r["num_points"][name]) for r in records]

    rows = []
    for title, name, other in CONTROLS:
        gaps = [a - b for a, b in zip(shares(name), shares(other), strict=True)] if other else []
        right, points = (sum(r[what][name] for r in records) for what in ("right", "num_points"))
        rows.append([title, f"{100 * right / max(1, points):.1f}", with_error(gaps)])
    header = [f"frames 0, 3, 6 ... of {len(records)} clips, net in sequence", "PCK@0.2, %", "change in a clip, points"]
    return markdown_table(header, rows)


def live_plot(records: Sequence[Record], path: Path) -> None:
    """Three panels over the camera's rate: accuracy live (dotted: offline), frames dropped, reaction.

    Accuracies are shares of what the baseline has offline on the same clips, as not all rates have the same ones; a net
    is left out at rates at which the baseline did not see its clips.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4))
    rates = rates_of(records)
    for number, net in enumerate(dict.fromkeys(r["case"]["net"] for r in records)):
        own = {rate: found[net] for rate in rates if net in (found := by_net(records, rate))}
        style: dict[str, Any] = {"color": f"C{number}", "marker": "s" if net.startswith("predictive") else "o"}
        ceilings = {rate: ceiling(found, by_net(records, rate).get(BASELINE, [])) for rate, found in own.items()}
        for name, line in (("right", "-"), ("right_offline", ":")):
            shares = {rate: 100 * share(own[rate], name) / most for rate, most in ceilings.items() if most}
            shown = style | ({"label": net} if line == "-" else {"marker": "", "linewidth": 1})
            axes[0].plot(list(shares), list(shares.values()), linestyle=line, **shown)
        dropped = [100 * total(r, "num_dropped") / total(r, "num_frames") for r in own.values()]
        axes[1].plot(list(own), dropped, **style)
        axes[2].plot(list(own), [percentiles(all_of(r, "reaction_ms"))[0] for r in own.values()], **style)
    axes[0].set(title="accuracy on the newest frame", ylabel="% of sequential offline PCK (dotted: offline)")
    axes[1].set(title="frames dropped", ylabel="%")
    axes[2].set(title="from a frame to an answer that has seen it", ylabel="ms, median", yscale="log")
    for axis in axes:
        axis.set_xlabel("camera, frames/s")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    with write_beside(path) as part:
        figure.savefig(part, dpi=110, format="png")
    plt.close(figure)
