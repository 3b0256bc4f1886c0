"""Depth-parallel on a CPU against what people use today: batch 1, one stream, 224 x 224, float32.

    python benchmarks/depth_parallel_cpu/run.py --passes 5 --seconds 2.5

In each pass every candidate of a model runs once under every condition, in an order shuffled by the seed, so that
slow drifts of the machine hit all of them alike. One JSON line per (pass, model, candidate, condition), written as it
is measured; what is already in the file is not measured again.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from candidates import MODELS, REFERENCE, STAGE_COUNTS, Candidate, Entry, Start, candidates
from conditions import CONDITIONS, OthersShare, condition
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sidestream.report.measure import machine, num_cores
from sidestream.report.record import json_lines, read_json_lines

HERE = Path(__file__).parent
QUICK = {"models": ["mobilenet_v3_large"], "passes": 1, "seconds": 0.5, "stages": ["2", "4"], "skip": ["torch.compile"]}
MIN_ANSWERS = 5
Key = tuple[int, str, str, str]


def measure(start: Start, seconds: float, warm_up_seconds: float) -> tuple[list[float], float]:
    """Latencies of the answers within ``seconds`` after a warm-up, and the time they took."""
    stream = start()
    try:
        _answers(stream, warm_up_seconds)
        began = time.perf_counter()
        latencies = _answers(stream, seconds)
        return latencies, time.perf_counter() - began
    finally:
        stream.close()  # type: ignore[attr-defined]


def _answers(stream: Iterator[float], seconds: float) -> list[float]:
    until, latencies = time.perf_counter() + seconds, [next(stream)]
    while len(latencies) < MIN_ANSWERS or time.perf_counter() < until:
        latencies.append(next(stream))
    return latencies


def order(names: Iterable[str], *key: Any) -> list[str]:
    """``names`` shuffled, the same way for the same key."""
    shuffled = sorted(names)
    random.Random("/".join(map(str, key))).shuffle(shuffled)
    return shuffled


class Benchmark:
    """The loop over models, passes, conditions and candidates."""

    def __init__(self, options: argparse.Namespace, write: Callable[[dict[str, Any]], None], done: set[Key]) -> None:
        self.options, self.write, self.done = options, write, done
        self.machine = machine()

    def run(self, progress: Progress) -> None:
        for model in self.options.models:
            torch.compiler.reset()
            self._run_model(model, progress)
            gc.collect()

    def _run_model(self, model: str, progress: Progress) -> None:
        entry = Entry(model, self.options.threads)
        wanted = {c.name: c for c in candidates(entry, tuple(self.options.stages)) if self._is_wanted(c, model)}
        starts = self._set_up(model, wanted, progress)
        todo = [key for key in self._keys(model, starts) if key not in self.done]
        task = progress.add_task(model, total=len(todo))
        last: tuple[int, str] | None = None
        for pass_number, kind in dict.fromkeys((key[0], key[3]) for key in todo):
            last = pass_number, kind
            with condition(kind) as spinners:
                for name in (key[2] for key in todo if (key[0], key[3]) == last):
                    progress.update(task, description=f"{model} pass {pass_number} {kind}: {name}")
                    record = self._measure(starts[name], wanted[name], spinners)
                    self.write({"pass": pass_number, "model": model, "candidate": name, "condition": kind} | record)
                    progress.advance(task)
        progress.update(task, description=model)

    def _is_wanted(self, candidate: Candidate, model: str) -> bool:
        if any(text in candidate.name for text in self.options.skip):
            return False
        is_chosen = not self.options.only or any(text in candidate.name for text in self.options.only)
        if not is_chosen and candidate.name != REFERENCE:
            return False
        passes = range(1, self.options.passes + 1)
        keys = {(n, model, candidate.name, kind) for n in passes for kind in self.options.conditions}
        return not keys <= self.done

    def _keys(self, model: str, names: Iterable[str]) -> list[Key]:
        options, keys = self.options, []
        for n in range(1, options.passes + 1):
            for kind in order(options.conditions, options.seed, n, model):
                keys += [(n, model, name, kind) for name in order(names, options.seed, n, model, kind)]
        return keys

    def _set_up(self, model: str, wanted: dict[str, Candidate], progress: Progress) -> dict[str, Start]:
        """Convert and compile once; a candidate that fails is reported and left out."""
        starts: dict[str, Start] = {}
        task = progress.add_task(f"{model}: set up", total=len(wanted))
        for name, candidate in wanted.items():
            progress.update(task, description=f"{model}: set up {name}")
            began = time.perf_counter()
            try:
                starts[name] = candidate.make()
                candidate.notes["set_up_seconds"] = round(time.perf_counter() - began, 2)
            except Exception as error:
                progress.console.print(f"[red]{model}, {name} is left out: {type(error).__name__}: {error}")
            progress.advance(task)
        progress.remove_task(task)
        return starts

    def _measure(self, start: Start, candidate: Candidate, spinners: list[Any]) -> dict[str, Any]:
        others = OthersShare(spinners)
        latencies, elapsed = measure(start, self.options.seconds, self.options.warm_up)
        return {
            "kind": candidate.kind,
            "frames_per_second": round(len(latencies) / elapsed, 4),
            "latency_p50_ms": round(statistics.median(latencies) * 1e3, 3),
            "num_frames": len(latencies),
            "seconds": round(elapsed, 4),
            "others_cores": round(others.cores(), 3),
            "num_threads": self.options.threads,
            "notes": dict(candidate.notes),
            "machine": self.machine,
        }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.5, help="measured time of a candidate in a pass")
    parser.add_argument("--warm-up", type=float, default=0.5, help="seconds before that (five answers at least)")
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=CONDITIONS)
    parser.add_argument("--stages", nargs="+", default=list(STAGE_COUNTS), choices=STAGE_COUNTS)
    parser.add_argument("--threads", type=int, default=num_cores(), help="threads of every candidate with several")
    parser.add_argument("--only", nargs="+", default=[], help="only candidates whose name holds one of these")
    parser.add_argument("--skip", nargs="+", default=[], help="no candidates whose name holds one of these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--quick", action="store_true", help=f"a look in about two minutes: {QUICK}")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
        options.out = options.out.with_name("quick.jsonl") if options.out.name == "results.jsonl" else options.out
    return options


def main() -> None:
    options = parse()
    records = read_json_lines(options.out) if options.out.exists() else []
    if any(record["machine"] != machine() for record in records):
        raise SystemExit(f"{options.out} holds results of another machine or other versions; give another --out")
    done = {(r["pass"], r["model"], r["candidate"], r["condition"]) for r in records}
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with json_lines(options.out, append=True) as write, Progress(*columns, TimeRemainingColumn()) as progress:
        Benchmark(options, write, done).run(progress)


if __name__ == "__main__":
    main()
