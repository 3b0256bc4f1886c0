"""``sidestream compare``: the model families side by side, measured on this machine, with the talk's marks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sidestream.cli.early import check_files
from sidestream.errors import InputError

if TYPE_CHECKING:
    from sidestream.evals.compare import Setting


def compare(
    models: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    num_frames: int = 16,
    size: int = 112,
    out: Path = Path("compare"),
    parts: str = "params,flops,causality,latency,memory",
    accuracy: tuple[Path, ...] = (),
    answer_every: int = 8,
    lengths: tuple[int, ...] = (8, 16, 32, 64),
    repeats: int = 5,
    seconds: float = 1.0,
    threads: int | None = None,
    device: str = "cpu",
) -> int:
    """Measure model families at equal input: parameters, FLOPs, causality, latency, throughput, energy, memory.

    Writes results.jsonl (one record per measurement), compare.png and tables.md. Stopped and started again with the
    same settings, it goes on where it was. Weights are random; accuracy comes from a file.

    Args:
        models: names from `sidestream models`; none: one per column of the talk's table, and some more.
        num_frames: frames of a clip and of a sliding window.
        size: height and width of the frames, pixels.
        out: folder for the results.
        parts: what to measure, with commas between.
        accuracy: files of JSON lines with model, method and top1, 0 to 1 (as benchmarks/families has).
        answer_every: frames from one answer of a sliding window to the next.
        lengths: frames of the clips for the training memory.
        repeats: times that every model is timed, in turn.
        seconds: time of one model in one repeat.
        threads: threads of every measurement (default: all cores).
        device: cpu or cuda.
    """
    for flag, value in (
        ("num-frames", num_frames),
        ("size", size),
        ("answer-every", answer_every),
        ("repeats", repeats),
        ("threads", threads),
        ("lengths", min(lengths, default=None)),
    ):
        if value is not None and value < 1:
            raise InputError(f"--{flag} {value}; expected 1 or more")
    check_files("--accuracy", accuracy)
    from sidestream.evals.compare import Setting, check_parts
    from sidestream.evals.compare_talk import DEFAULT_MODELS
    from sidestream.models.create import check_model
    from sidestream.report.measure import num_cores

    check_parts(parts.split(","))
    _check_device(device)
    for name in models:
        check_model(name)
    setting = Setting(
        num_frames=num_frames,
        size_px=size,
        answer_every=answer_every,
        lengths=lengths,
        num_repeats=repeats,
        seconds=seconds,
        num_threads=num_cores() if threads is None else threads,
        device=device,
        causality_size_px=min(size, 64),
    )
    chosen = tuple(dict.fromkeys(models or DEFAULT_MODELS))  # each once, in the order given
    records = measure_to(out, chosen, setting, parts.split(","))
    shown = sorted((r for r in records if r["model"] in chosen), key=lambda r: chosen.index(r["model"]))
    show(out, shown, num_frames, accuracy)
    return 0


def measure_to(out: Path, models: tuple[str, ...], setting: Setting, parts: list[str]) -> list[dict[str, Any]]:
    """Measure what ``out``/results.jsonl has not yet, and give all of its records.

    Raises ``InputError`` where the file holds results of another setting or machine.
    """
    from dataclasses import asdict

    from rich.console import Console

    from sidestream.evals.compare import compare
    from sidestream.report.measure import machine
    from sidestream.report.record import json_lines, read_json_lines

    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.jsonl"
    records = read_json_lines(path) if path.exists() else []
    own = (asdict(setting) | {"lengths": list(setting.lengths)}, machine())
    if any((r["setting"], r["machine"]) != own for r in records):
        raise InputError(f"{path} holds results of other settings or of another machine; give another --out")
    console = Console(stderr=True)
    with json_lines(path, append=True) as write, console.status("starting") as status:
        for record in compare(models, setting, parts=parts, done=list(records), say=status.update):
            write(record)
            records.append(record)
            if reason := record.get("error") or record.get("skipped"):
                print(f"{record['part']}, {record['model']}: {reason}")
            elif not console.is_terminal:  # where no spinner says what is being done
                print(_what(record), file=sys.stderr, flush=True)
    return records


def _what(record: dict[str, Any]) -> str:
    """Which measurement a record is, in a line."""
    which = (str(record.get("work") or ""), *(f"{n} {record[n]}" for n in ("num_frames", "repeat") if record.get(n)))
    return f"{record['part']}, {record['model']}: {' '.join(filter(None, which)) or 'done'}"


def _check_device(device: str) -> None:
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}, but torch sees no GPU; use cpu, or see sidestream doctor")


def show(out: Path, records: list[dict[str, Any]], num_frames: int, accuracy: tuple[Path, ...]) -> None:
    """Tables to the terminal and to ``out``/tables.md, the picture to ``out``/compare.png."""
    from sidestream.evals.compare_plot import draw
    from sidestream.evals.compare_table import (
        accuracy_table,
        collect,
        cost_table,
        speed_table,
        talk_table,
        training_memory_table,
    )
    from sidestream.evals.compare_talk import MARKS_NOTE
    from sidestream.report.record import read_json_lines, write_text
    from sidestream.report.table import markdown_table

    accuracies = [record for path in accuracy for record in read_json_lines(path)]
    found = collect(records, accuracies)
    tables = {
        "The talk's marks beside the figures measured": talk_table(found, num_frames),
        "On one stream (median [least – greatest])": speed_table(found),
        "What it costs": cost_table(found, num_frames),
        "Peak memory of a training step": training_memory_table(found),
        "Accuracy": accuracy_table(accuracies),
    }
    text = [where_measured(records), ""]
    for title, (header, rows) in tables.items():
        if not rows:
            continue
        _print(title, header, rows)
        text += [f"### {title}", "", markdown_table(header, rows)]
    print(MARKS_NOTE)
    write_text(out / "tables.md", "\n".join([*text, MARKS_NOTE, ""]))
    draw(found, num_frames, out / "compare.png")
    print(f"wrote {out / 'results.jsonl'}, {out / 'tables.md'} and {out / 'compare.png'}")


def where_measured(records: list[dict[str, Any]]) -> str:
    """The machine and the setting of the records, in a sentence."""
    if not records:
        return "Nothing was measured."
    machine, setting = records[0]["machine"], records[0]["setting"]
    gib = f"{machine['memory_bytes'] / 2**30:.0f} GiB, " if machine["memory_bytes"] else ""
    return (
        f"{machine['cpu']}, {machine['num_cores']} cores, {gib}torch {machine['torch']}, {setting['device']}, "
        f"{setting['num_threads']} threads; clips of {setting['num_frames']} frames of {setting['size_px']} x "
        f"{setting['size_px']} px, batch 1, float32, random weights; sliding windows answer every "
        f"{setting['answer_every']} frames; timings are medians of {setting['num_repeats']} repeats in turn."
    )


def _print(title: str, header: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, show_lines=True)
    for n, name in enumerate(header):
        table.add_column(name, justify="left" if n == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
