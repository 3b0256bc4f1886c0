"""The closing table of a run and Markdown tables, against hand-made ones."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from sidestream.report import RunSummary, markdown_table, summary_table
from sidestream.report.table import summary_rows

SUMMARY = RunSummary(
    num_frames_in=120,
    num_answered=100,
    num_dropped=20,
    wall_seconds=4.0,
    latencies_seconds=[0.010, 0.020, 0.030, 0.040, 0.050],
    peak_memory_bytes=512 * 2**20,
    busy_shares={"stage 1 [stem]": 0.914, "stage 2": 0.5},
    title="resnet50, pipelined",
)


def test_rows_by_hand():
    assert summary_rows(SUMMARY) == [
        ("frames in / answered / dropped", "120 / 100 / 20"),
        ("answers per second", "25.0"),
        ("latency p50 / p95 / p99", "30.0 / 48.0 / 49.6 ms"),
        ("peak memory", "512 MiB"),
        ("busy: stage 1 [stem]", "91 %"),
        ("busy: stage 2", "50 %"),
    ]


def test_a_run_without_answers_has_a_table_too():
    empty = RunSummary(num_frames_in=0, num_answered=0, num_dropped=0, wall_seconds=0.0)
    assert math.isnan(empty.frames_per_second)
    assert [value for _, value in summary_rows(empty)] == ["0 / 0 / 0", "-", "- / - / - ms", "unknown"]


def test_the_rich_table_shows_every_row_as_it_is():
    """Brackets in names are no markup."""
    console = Console(file=io.StringIO(), width=100)
    console.print(summary_table(SUMMARY))
    shown = console.file.getvalue()
    assert "resnet50, pipelined" in shown
    for what, value in summary_rows(SUMMARY):
        assert any(what in line and value in line for line in shown.splitlines()), what


def test_markdown():
    rows = [["resnet50", 12.345, None, 3], ["a|b", math.nan, "1.6x", 0.25]]
    assert markdown_table(["model", "frames/s", "ratio", "n"], rows) == (
        "| model    | frames/s | ratio |   n |\n"
        "| -------- | -------: | ----: | --: |\n"
        "| resnet50 |     12.3 |     - |   3 |\n"
        "| a\\|b     |        - |  1.6x | 0.2 |\n"
    )
    with pytest.raises(ValueError, match="row 1 has 2 cells, but the header has 3"):
        markdown_table(["a", "b", "c"], [[1, 2]])
