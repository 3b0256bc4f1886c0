"""Writes the tables into README.md, between its two markers, from results.jsonl.

python benchmarks/depth_parallel_cpu/table.py [--results FILE] [--readme FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from summary import REFERENCE, Row, Spread, best, rows

from sidestream.report.record import read_json_lines, write_text

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: begin (written by table.py) -->", "<!-- results: end -->"


def between_markers(readme: str, text: str) -> str:
    """``readme`` with ``text`` between its markers."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise SystemExit(f"the README needs each of the lines {BEGIN!r} and {END!r} once")
    return f"{readme.split(BEGIN)[0]}{BEGIN}\n\n{text}\n\n{END}{readme.split(END)[1]}"


def report(records: Sequence[dict[str, Any]]) -> str:
    """Machine, summary and one table per model, as Markdown."""
    found = rows(records)
    models = list(dict.fromkeys(row.model for row in found))
    parts = [_machine(records, found), _summary(found, models)]
    parts += [_model_table([row for row in found if row.model == model], model) for model in models]
    return "\n\n".join(parts)


def _machine(records: Sequence[dict[str, Any]], found: Sequence[Row]) -> str:
    last = records[-1]["machine"]
    packages = ("torch", "torchvision", "onnxruntime", "openvino")
    versions = ", ".join(f"{name} {last[name]}" for name in packages if last.get(name))
    others = max(row.others_cores for row in found)
    passes = sorted({row.num_passes for row in found})
    return (
        f"{last['cpu']}, {last['num_cores']} cores, {last['memory_bytes'] / 2**30:.0f} GiB, {last['system']}, "
        f"Python {last['python']}, {versions}. Passes: {'-'.join(map(str, {passes[0]: 0, passes[-1]: 0}))}. "
        f"Other processes never used more than {others:.2f} cores during a measurement."
    )


def _summary(found: Sequence[Row], models: Sequence[str]) -> str:
    head = ["model", REFERENCE, "eager, more threads", "pipelined on eager", "÷ eager 1", "÷ eager more", "best rival"]
    head += ["best pipelined", "÷ rival", "best `auto`", "÷ rival", "best pipelined, one core busy: kept"]
    lines = [_line(head), _line(["---"] * len(head))]
    lines += [_line([model, *_summary_cells([row for row in found if row.model == model])]) for model in models]
    return "### Summary (frames/s, quiet machine, medians)\n\n" + "\n".join(lines)


def _summary_cells(found: Sequence[Row]) -> list[str]:
    quiet = [row for row in found if row.condition == "quiet"]
    one = best((row for row in quiet if row.candidate == REFERENCE), "eager")
    more = best((row for row in quiet if row.candidate != REFERENCE), "eager")
    on_eager = best((row for row in quiet if row.candidate.endswith(", eager")), "pipelined")
    rival, pipelined, auto = (best(quiet, kind) for kind in ("rival", "pipelined", "auto"))
    busy = [row for row in found if row.condition == "busy" and pipelined and row.candidate == pipelined.candidate]
    kept = f"{busy[0].kept.median:.0%}" if busy and busy[0].kept else "–"
    cells = [_number(one), _number(more), _named(on_eager), _over(on_eager, one), _over(on_eager, more), _named(rival)]
    return [*cells, _named(pipelined), _over(pipelined, rival), _named(auto), _over(auto, rival), kept]


def _model_table(found: Sequence[Row], model: str) -> str:
    quiet = {row.candidate: row for row in found if row.condition == "quiet"}
    busy = {row.candidate: row for row in found if row.condition == "busy"}
    names = sorted({**quiet, **busy}, key=lambda n: -(quiet.get(n) or busy[n]).frames_per_second.median)
    head = ["candidate", "frames/s", "× eager 1", "latency p50, ms", "busy: frames/s", "busy: × eager 1", "busy: kept"]
    lines = [_line(head), _line(["---", *["---:"] * 6])]
    for name in names:
        q, b = quiet.get(name), busy.get(name)
        picked = sorted({*(q.picked if q else ()), *(b.picked if b else ())})
        label = f"{name} (picked {', '.join(picked)})" if picked else name
        latency = "–" if q is None else f"{q.latency_p50_ms:.1f}"
        cells = [_spread(q and q.frames_per_second, 1), _spread(q and q.ratio, 2), latency]
        cells += [_spread(b and b.frames_per_second, 1), _spread(b and b.ratio, 2), _spread(b and b.kept, 2)]
        lines.append(_line([label, *cells]))
    return f"### {model}\n\nMedian [least – greatest] over the passes.\n\n" + "\n".join(lines)


def _spread(value: Spread | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value.median:.{digits}f} [{value.least:.{digits}f} – {value.greatest:.{digits}f}]"


def _named(row: Row | None) -> str:
    return "–" if row is None else f"{row.frames_per_second.median:.1f} ({row.candidate})"


def _number(row: Row | None) -> str:
    return "–" if row is None else f"{row.frames_per_second.median:.1f}"


def _over(row: Row | None, other: Row | None) -> str:
    if row is None or other is None:
        return "–"
    return f"{row.frames_per_second.median / other.frames_per_second.median:.2f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md")
    options = parser.parse_args()
    text = report(read_json_lines(options.results))
    write_text(options.readme, between_markers(options.readme.read_text(encoding="utf-8"), text))
    print(f"wrote the tables of {options.results} into {options.readme}")


if __name__ == "__main__":
    main()
