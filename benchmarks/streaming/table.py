"""table.md and the pictures from the records of results.jsonl."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sidestream.report.record import write_text
from sidestream.report.table import markdown_table

Record = dict[str, Any]
Records = Sequence[Record]
Share = tuple[float, float]
"""Right points over points: live, and offline."""
Point = dict[str, dict[int, Share]]
"""By net and seed."""
CENTRE = "speed, the centre alone"
STUDIES = {
    "frame rate": "frames a second",
    "motion": "quarter of the clips, 1 moves least (30 frames/s)",
    "speed": "speed of the moving shapes (30 frames/s)",
    CENTRE: "speed of the moving shapes (30 frames/s)",
}
SEQUENTIAL = ("sequential", "sequential, forecast")
GOAL = 2.0
MARKS = "<!-- table.md -->", "<!-- end of table.md -->"
"""In README.md the table stands between them."""


def write_all(records: Records, folder: Path) -> str:
    """Writes table.md and the pictures; returns the table."""
    from plot import draw

    points = {study: points_of(records, study) for study in STUDIES}
    parts = [
        device(records),
        overload(records),
        *(accuracy(points[s], s) for s in STUDIES),
        trainings(records),
        starts(records),
        gap_text(points),
    ]
    text = "\n".join(part for part in (*parts, control(records), live(records, folder)) if part)
    write_text(folder / "table.md", text)
    _put_into(folder / "README.md", text)
    draw(points, folder / "streaming.png")
    return text


def _put_into(readme: Path, table: str) -> None:
    """Between the marks, where there is such a file."""
    if readme.is_file():
        before, begin, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
        _, end, after = rest.partition(MARKS[1])
        if begin and end:
            write_text(readme, f"{before}{begin}\n\n{table}\n{end}{after}")


def of(records: Records, part: str) -> list[Record]:
    return [r for r in records if r["part"] == part]


def summed(record: Record) -> Mapping[str, int]:
    """Over the bins of motion."""
    some = [b for b in record["motion_bins"] if b is not None]
    return {name: sum(b[name] for b in some) for name in some[0]}


def share_of(sums: Mapping[str, int], prefix: str = "settled_") -> Share:
    points = max(1, sums[f"{prefix}points"])
    return sums[f"{prefix}right"] / points, sums[f"{prefix}right_offline"] / points


def points_of(records: Records, study: str, prefix: str = "settled_") -> dict[float, Point]:
    """By the value that is varied. Sums that do not count what is asked for (older records) are left out."""
    found: dict[float, Point] = {}
    prefix = "settled_centre_" if study == CENTRE else prefix

    def add(x: float, record: Record, sums: Mapping[str, int] | None) -> None:
        if sums is not None and f"{prefix}points" in sums:
            case = record["case"]
            found.setdefault(x, {}).setdefault(case["net"], {})[case["seed"]] = share_of(sums, prefix)

    is_speed = study in ("speed", CENTRE)
    for record in of(records, "synthetic" if is_speed else "accuracy"):
        if is_speed:
            add(record["case"]["speed"], record, record)
        elif study == "frame rate":
            add(record["case"]["frame_rate"], record, summed(record))
        elif record["case"]["frame_rate"] == 30:
            for number, sums in enumerate(record["motion_bins"], start=1):
                add(number, record, sums)
    return dict(sorted(found.items()))


def kept(point: Point, net: str) -> list[float]:
    """Per seed: live, as a share of what the sequential net has offline. One ceiling for all nets."""
    ceiling = point.get("sequential", {})
    return [live / ceiling[seed][1] for seed, (live, _) in point.get(net, {}).items() if ceiling.get(seed, (0, 0))[1]]


def accuracy(points: Mapping[float, Point], study: str) -> str:
    if not points:
        return ""
    nets = list(dict.fromkeys(net for point in points.values() for net in point))
    texts = []
    columns: list[tuple[str, Callable[[Point, str], list[float]]]] = [
        ("PCK@0.2 live, %", lambda point, net: [live for live, _ in point.get(net, {}).values()]),
        ("share of the sequential net's offline accuracy, %", kept),
    ]
    if study != "frame rate":
        columns.insert(0, ("PCK@0.2 offline, %", lambda point, net: [off for _, off in point.get(net, {}).values()]))
    for title, values in columns:
        rows = [[net, *(spread(values(point, net)) for point in points.values())] for net in nets]
        header = [title, *(f"{x:g}" for x in points)]
        if study == "frame rate" and title.startswith("PCK"):
            first = next(iter(points.values()))
            rows = [[net, spread([off for _, off in first.get(net, {}).values()]), *row] for net, *row in rows]
            header.insert(1, "offline")
        texts.append(markdown_table(header, rows))
    return f"### Against {study}: {STUDIES[study]}\n\n" + "\n".join(texts)


def starts(records: Records) -> str:
    """The same with the beginning of each clip, where there is no answer yet, and how old the answers are."""
    whole, settled = points_of(records, "frame rate", ""), points_of(records, "frame rate")
    if not whole:
        return ""
    accuracies, behind = [], []
    for net in next(iter(settled.values())):
        own = [r for r in of(records, "accuracy") if r["case"]["net"] == net]
        accuracies.append([net, *(spread([live for live, _ in p.get(net, {}).values()]) for p in whole.values())])
        ages = []
        for rate in whole:
            sums = [summed(r) for r in own if r["case"]["frame_rate"] == rate]
            ages.append(sum(s["mismatch"] for s in sums) / max(1, sum(s["frames"] - s["misses"] for s in sums)))
        behind.append([net, *(f"{age:.2f}" for age in ages)])
    rates = [f"{x:g}" for x in whole]
    tables = (
        markdown_table(["all frames: PCK@0.2 live, %", *rates], accuracies),
        markdown_table(["frames behind", *rates], behind),
    )
    return "### With the beginning of each clip\n\n" + "\n".join(tables)


def spread(shares: Sequence[float]) -> str:
    """Mean, and range over the seeds, in percent."""
    if not shares:
        return "-"
    mean = f"{100 * statistics.mean(shares):.1f}"
    return mean if len(shares) == 1 else f"{mean} [{100 * min(shares):.1f}, {100 * max(shares):.1f}]"


def device(records: Records) -> str:
    some = of(records, "timing")
    if not some:
        return ""
    rates = sorted({r["case"]["frame_rate"] for r in some})
    found = {(r["case"]["net"], r["case"]["frame_rate"]): r for r in some}
    nets = list(dict.fromkeys(r["case"]["net"] for r in some))
    texts = [_profile(records)]
    figures: list[tuple[str, int | None, Callable[[Record], str]]] = [
        ("answers a second", None, lambda r: f"{r['answers_per_s']:.1f}"),
        ("reaction, ms: to an answer that the frame has a part in", 0, lambda r: f"{r['reaction_ms'][0]:.0f}"),
        ("the same, ms, when the frame that it speaks of is there", 0, lambda r: f"{r['in_use_ms'][0]:.0f}"),
        ("answer, ms: to the answer about the frame", 1, lambda r: f"{r['answer_ms'][0]:.0f}"),
    ]
    for title, ticks, value in figures:
        rows = [[net, *(value(found[net, x]) if (net, x) in found else "-" for x in rates)] for net in nets]
        header = [title, *(f"{x:g} frames/s" for x in rates)]
        if ticks is not None:
            of_net = {r["case"]["net"]: str(r["ticks"][ticks]) for r in some}
            rows, header = [[net, of_net[net], *row] for net, *row in rows], [title, "ticks", *header[1:]]
        texts.append(markdown_table(header, rows))
    busy = []
    for net in (n for n in nets if (n, rates[-1]) in found):
        shares = found[net, rates[-1]]["busy"]
        busy.append([net, *(f"{100 * share:.0f}" for share in shares), f"{100 * statistics.mean(shares):.0f}"])
    stages = [f"stage {n}" for n in range(1, max((len(row) for row in busy), default=2) - 1)]
    texts.append(markdown_table([f"workers busy at {rates[-1]:g} frames/s, %", *stages, "mean"], busy))
    return "### The device\n\n" + "\n".join(texts)


def overload(records: Records) -> str:
    """How many frames are let in, where the camera is faster than the slowest stage."""
    some = of(records, "overload")
    if not some:
        return ""
    rows = [
        [
            r["case"]["inside"],
            f"{r['answers_per_s']:.1f}",
            *(f"{r[name][0]:.0f} / {r[name][1]:.0f}" for name in ("inside_ms", "latency_ms")),
        ]
        for r in some
    ]
    rate = some[0]["case"]["frame_rate"]
    header = ["frames inside", "answers/s", "from being taken up to the answer, ms p50 / p95", "from its arrival, ms"]
    return f"### Pipelined, under a camera of {rate:g} frames/s\n\n" + markdown_table(header, rows)


def _profile(records: Records) -> str:
    texts = []
    for r in of(records, "profile"):
        means = [1e3 * r["factor"] * statistics.mean(column) for column in zip(*r["rows_seconds"], strict=True)]
        texts.append(
            f"Stages, ms: {', '.join(f'{m:.1f}' for m in means)}: as measured on one thread ({r['machine']['cpu']}), "
            f"all {r['factor']:.1f} times as long, so that the net takes {1e3 * r['factor'] * r['net_seconds']:.0f} ms "
            f"in place of {1e3 * r['net_seconds']:.2f}.\n"
        )
    return "".join(texts)


def gaps(points: Mapping[str, Mapping[float, Point]], *, forecasts: bool) -> list[tuple[float, str, float, str, str]]:
    """(ratio, study, value, depth-parallel net, sequential net) of every point, largest first: the best of each kind.

    A ratio is one of means over the seeds that both nets have. Without ``forecasts`` nets that are helped by a forecast
    do not take part.
    """
    found = []
    for study, by_value in points.items():
        for x, point in by_value.items():
            names = [n for n in point if forecasts or "forecast" not in n]
            seeds = set.intersection(*(set(point[n]) for n in names)) if names else set()
            means = {n: statistics.mean(point[n][s][0] for s in seeds) for n in names if seeds}
            rivals = {n: v for n, v in means.items() if n in SEQUENTIAL}
            others = {n: v for n, v in means.items() if n not in SEQUENTIAL}
            if rivals and others and max(rivals.values()) > 0:
                best, rival = max(others, key=others.__getitem__), max(rivals, key=rivals.__getitem__)
                found.append((others[best] / rivals[rival], study, x, best, rival))
    return sorted(found, reverse=True)


def gap_text(points: Mapping[str, Mapping[float, Point]]) -> str:
    lines = []
    whole = [study for study in points if study != CENTRE]
    groups = (("", whole), (" on JHMDB", ["frame rate", "motion"]), (", the shapes' centre alone", [CENTRE]))
    for title, forecasts in (("largest gap", False), ("largest gap, each side with its best forecast", True)):
        for name, studies in groups:
            if found := gaps({s: points[s] for s in studies}, forecasts=forecasts):
                ratio, study, x, best, rival = found[0]
                verdict = "met" if ratio >= GOAL else "not met"
                both = [statistics.mean(live for live, _ in points[study][x][n].values()) for n in (best, rival)]
                value = f"{study.partition(',')[0]} {x:g}"
                where = f"{value}, {best} against {rival} (PCK {100 * both[0]:.1f} % and {100 * both[1]:.1f} %)"
                lines.append(f"{title}{name}: {ratio:.2f} times at {where}; goal {GOAL:g}x: {verdict}.")
    lines += [text for text in [against_forecast(points)] if text]
    return "### The largest gap on the simulated device\n\n" + "\n\n".join(lines) + "\n" if lines else ""


def against_forecast(points: Mapping[str, Mapping[float, Point]]) -> str:
    """Moving shapes, by speed: live PCK of the parallel net over that of the sequential one with a forecast."""
    rows = []
    speeds = list(points["speed"])
    for title, study in (("all five points", "speed"), ("the centre alone", CENTRE)):
        ratios = [ratio(points[study].get(x, {}), "parallel", "sequential, forecast") for x in speeds]
        if any(r is not None for r in ratios):
            rows.append([title, *("-" if r is None else f"{r:.2f}" for r in ratios)])
    header = ["parallel against the sequential net with a forecast, times, at speed", *(f"{x:g}" for x in speeds)]
    return markdown_table(header, rows).rstrip("\n") if rows else ""


def ratio(point: Point, net: str, rival: str) -> float | None:
    """Of live means over the seeds that both have."""
    own, other = point.get(net, {}), point.get(rival, {})
    seeds = own.keys() & other.keys()
    below = sum(other[seed][0] for seed in seeds)
    return sum(own[seed][0] for seed in seeds) / below if below else None


def trainings(records: Records) -> str:
    some = of(records, "trainings")
    if not some:
        return ""
    from trainings import table_of

    return f"### Every way of training, at {some[0]['frame_rate']:g} frames/s\n\n" + markdown_table(*table_of(some))


def control(records: Records) -> str:
    some = of(records, "control")
    if not some:
        return ""
    from live_report import control_table

    return "### What dropping and lateness do, without a clock\n\n" + control_table(some)


def live(records: Records, folder: Path) -> str:
    some = of(records, "live")
    if not some:
        return ""
    from live_report import live_plot, live_table

    live_plot(some, folder / "live.png")
    return "### Live on this machine\n\n" + live_table(some) + "\n"
