"""Tables: the closing one of a run, and Markdown for a README."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sidestream.report.measure import percentiles

if TYPE_CHECKING:
    from rich.table import Table

_MIB = 2**20


@dataclass(frozen=True)
class RunSummary:
    """What a run did, in numbers."""

    num_frames_in: int
    """Frames that the source made available, dropped ones included."""
    num_answered: int
    num_dropped: int
    wall_seconds: float
    """From the first frame's arrival to the last answer."""
    latencies_seconds: Sequence[float] = ()
    """From arrival to answer, one per answered frame."""
    peak_memory_bytes: int | None = None
    busy_shares: Mapping[str, float] = field(default_factory=dict)
    """Share of the run (0..1) in which each stage was at work, by name, in order of depth."""
    title: str = "run"

    @property
    def frames_per_second(self) -> float:
        """Answers per second of wall time; nan when no time has passed."""
        return self.num_answered / self.wall_seconds if self.wall_seconds > 0 else math.nan


def summary_rows(summary: RunSummary) -> list[tuple[str, str]]:
    """The rows of the closing table: what, and how much with its unit."""
    p50, p95, p99 = (1000 * seconds for seconds in percentiles(summary.latencies_seconds))
    peak = summary.peak_memory_bytes
    return [
        ("frames in / answered / dropped", f"{summary.num_frames_in} / {summary.num_answered} / {summary.num_dropped}"),
        ("answers per second", _number(summary.frames_per_second)),
        ("latency p50 / p95 / p99", f"{_number(p50)} / {_number(p95)} / {_number(p99)} ms"),
        ("peak memory", "unknown" if peak is None else f"{peak / _MIB:.0f} MiB"),
        *((f"busy: {name}", f"{100 * share:.0f} %") for name, share in summary.busy_shares.items()),
    ]


def summary_table(summary: RunSummary) -> Table:
    """The closing table of a run, for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(summary.title), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for what, value in summary_rows(summary):
        table.add_row(Text(what), Text(value))
    return table


@dataclass(frozen=True)
class StreamRow:
    """What a run did for one of several streams."""

    name: str
    num_frames_in: int
    """Frames that the source made available, dropped ones included."""
    num_answered: int
    num_dropped: int
    frames_per_second: float
    latencies_seconds: Sequence[float] = ()
    num_reconnects: int = 0


def streams_table(rows: Sequence[StreamRow], title: str, *, peak_memory_bytes: int | None) -> Table:
    """The closing table of a run on several streams, a row for each, for a terminal."""
    from rich.table import Table
    from rich.text import Text

    peak = "" if peak_memory_bytes is None else f"peak memory {peak_memory_bytes / _MIB:.0f} MiB"
    table = Table(title=Text(title), caption=peak)
    table.add_column("source", overflow="fold")
    for heading in ("in / answered / dropped", "answers/s", "p50 / p95 ms", "drop-outs"):
        table.add_column(heading, justify="right")
    for row in rows:
        p50, p95, _ = (1000 * seconds for seconds in percentiles(row.latencies_seconds))
        counts = f"{row.num_frames_in} / {row.num_answered} / {row.num_dropped}"
        figures = (counts, _number(row.frames_per_second), f"{_number(p50)} / {_number(p95)}", str(row.num_reconnects))
        table.add_row(Text(row.name), *map(Text, figures))
    return table


def choice_table(trials: Sequence[Any], picked: str) -> Table:
    """What was tried (``engine.auto.Trial``), the one named ``picked`` marked, for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table("tried", title="picked by measuring")
    table.add_column("frames/s", justify="right")
    table.add_column("latency, ms", justify="right")
    for t in trials:
        name, style = f"{t.name} {t.basis}".strip(), "bold" if t.name == picked else ""
        figures = f"{t.frames_per_second:.1f}", f"{t.latency_seconds * 1e3:.0f}"
        mark = "> " if t.name == picked else "  "
        table.add_row(Text(mark + name, style=style), *(Text(figure, style=style) for figure in figures))
    return table


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with columns of one width; the first is left-aligned, all others right.

    Floats are shown with one digit after the point, None as a dash. Raises ``ValueError`` for a row of another length.
    """
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    for number, row in enumerate(cells):
        if len(row) != len(header):
            raise ValueError(f"row {number} has {len(row)} cells, but the header has {len(header)}: {row}")
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    rule = [("-" * width if column == 0 else "-" * (width - 1) + ":") for column, width in enumerate(widths)]
    lines = [cells[0], rule, *cells[1:]]
    return "\n".join("| " + " | ".join(map(_pad, line, widths, range(len(widths)))) + " |" for line in lines) + "\n"


def _pad(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column == 0 else text.rjust(width)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return _number(value) if isinstance(value, float) else str(value).replace("|", "\\|")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"
