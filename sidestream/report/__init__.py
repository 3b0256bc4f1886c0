"""What a run says about itself: measurements, records, tables."""

from sidestream.report.measure import machine, peak_rss_bytes, percentiles
from sidestream.report.record import json_lines, read_json_lines, write_beside, write_text
from sidestream.report.table import RunSummary, markdown_table, summary_table

__all__ = [
    "RunSummary",
    "json_lines",
    "machine",
    "markdown_table",
    "peak_rss_bytes",
    "percentiles",
    "read_json_lines",
    "summary_table",
    "write_beside",
    "write_text",
]
