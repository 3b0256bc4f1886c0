"""What the recipes share: runs that are done once and kept as lines of a file, their mean and spread, their curves."""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sidestream.report.measure import machine
from sidestream.report.record import json_lines, read_json_lines, write_beside, write_text
from sidestream.train import TrainResult

Cell = dict[str, Any]
"""What tells one run from another: variant, model, seed ..."""
Record = dict[str, Any]
Run = Callable[[Cell, Path], TrainResult]
HERE = Path(__file__).parent
DONE = "done"
"""A file in the folder of a run that is whole."""


def main(
    about: str | None,
    run: Run,
    report: Callable[[], str],
    folder: Path,
    axes: Mapping[str, Sequence[Any]],
    *,
    not_by_default: Sequence[Any] = (),
) -> None:
    """The command line of a recipe: the runs of all cells, or of some, then table.md and the picture.

    ``axes``: what a cell says -> its values, of which those ``not_by_default`` must be asked for; the first changes
    slowest. Each is a flag: "seed" is ``--seeds``.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, values in axes.items():
        usual = [value for value in values if value not in not_by_default]
        flag = f"--{name.replace('_', '-')}s"
        parser.add_argument(flag, dest=name, nargs="+", type=type(values[0]), default=usual, choices=values)
    parser.add_argument("--runs", type=Path, help="keep the folders of the runs here; those that are missing are made")
    parser.add_argument("--again", action="store_true", help="also runs that have a record, which gets a newer one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="no runs")
    given = vars(parser.parse_args())
    torch.set_num_threads(given["threads"])
    if not given["report"]:
        folder.mkdir(exist_ok=True)
        chosen = itertools.product(*(given[name] for name in axes))
        cells = [dict(zip(axes, values, strict=True)) for values in chosen]
        command = " ".join(["python", f"recipes/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        run_all(cells, run, folder / "results.jsonl", command=command, runs=given["runs"], again=given["again"])
    if not known(folder / "results.jsonl"):
        print("no records yet")
        return
    table = report()
    write_text(folder / "table.md", table + "\n")
    print(table)


def run_all(
    cells: Iterable[Cell], run: Run, results: Path, *, command: str, runs: Path | None, again: bool = False
) -> None:
    """Each cell that is not in ``results`` yet is run and appended: its options, every epoch, time and machine.

    ``runs``: where the folders of the runs go, with weights and checkpoints; a cell without a whole one is run, too.
    None: they are thrown away. ``again``: every cell is run.
    """
    todo = list(cells)
    for number, cell in enumerate(todo, start=1):
        kept = None if runs is None else runs / "-".join(str(v) for v in cell.values())
        is_done = (kept is None or (kept / DONE).is_file()) and cell in [record["cell"] for record in known(results)]
        if is_done and not again:
            continue
        print(f"{number} of {len(todo)}: {cell}", flush=True)
        if kept is not None:  # a run that was broken off, or is to be made again
            shutil.rmtree(kept, ignore_errors=True)
        folder = kept or Path(tempfile.mkdtemp())
        try:
            result = run(cell, folder / "run")
            record = {
                "cell": cell,
                "history": [_plain(epoch) for epoch in result.history],
                "seconds": round(result.seconds, 1),
                "command": command,
                "machine": machine(),
            }
        finally:
            if runs is None:
                shutil.rmtree(folder)
        with json_lines(results, append=True) as write:
            write(record)
        if kept is not None:
            (kept / DONE).touch()


def known(results: Path) -> list[Record]:
    """A record per cell: the newest."""
    found = read_json_lines(results) if results.is_file() else []
    return list({tuple(sorted(record["cell"].items())): record for record in found}.values())


def _plain(epoch: Mapping[str, Any]) -> Record:
    left_out = ("kind", "num_skipped", "updates")
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in epoch.items() if k not in left_out}


def last(record: Record, name: str) -> float:
    """Of the last epoch: no epoch is chosen by what it scored."""
    return float(record["history"][-1][name])


def mean_and_spread(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """``mean ± standard deviation (n)``; a single value has no deviation."""
    if not values:
        return ""
    spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.{digits}f}{spread} ({len(values)})"


def draw_curves(
    panels: Mapping[str, Mapping[str, Sequence[Record]]], name: str, path: Path, *, label: str, scale: float = 1.0
) -> None:
    """One panel per title; a line per variant: the mean over its runs after each epoch, and the range as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4), squeeze=False, sharey=True)
    for axis, (title, variants) in zip(axes[0], panels.items(), strict=True):
        for number, (variant, records) in enumerate(variants.items()):
            rows = [[e for e in r["history"] if e.get(name) is not None] for r in records]
            if not rows:
                continue
            columns = [[scale * e[name] for e in column] for column in zip(*rows, strict=False)]
            epochs = [e["epoch"] + 1 for e in rows[0]][: len(columns)]
            means, color = [statistics.mean(c) for c in columns], f"C{number}"
            axis.plot(epochs, means, label=f"{variant} ({len(rows)})", color=color)
            axis.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.15)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(label)
    figure.tight_layout()
    named = axes[0][-1:] if len({tuple(variants) for variants in panels.values()}) == 1 else axes[0]
    for axis in named:  # once where all panels have the same lines
        if axis.lines:
            axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.2))  # below, where it hides no line
    with write_beside(path) as part:
        figure.savefig(part, dpi=110, format="png", bbox_inches="tight")
    plt.close(figure)
