"""Several cameras, one machine: answers per second of all streams together, and how long a frame is inside.

    python benchmarks/many_streams/run.py            # --quick for a look: one model, 1 and 4 streams, one pass

1, 2, 4 and 8 streams of decoded frames (224 x 224, float32, batch 1 each), as fast as they are taken. Rivals that a
user would write: a thread per stream on one intra-op thread each; one stream after the other on all cores; for models
without memory the frames of all streams as one batch on all cores. Ours: ``run_many`` with the model whole and in 2 and
4 stages. Candidates take turns in every pass, in another order each time; ratios are taken within a pass. Writes
results.jsonl and table.md here.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
MODELS = ("torchvision/mobilenet_v3_large", "tsm_mobilenet_v2_online")
STREAMS = (1, 2, 4, 8)
BASE = "a thread per stream"
Measured = tuple[float, float]
"""Answers per second, median seconds that a frame is inside."""


class Steps:
    """A model as a user drives it: one call per frame, the state of the stream in hand."""

    def __init__(self, net: nn.Module, frame: Tensor) -> None:
        from sidestream.nn.steppable import Steppable

        self.net, self.has_state = net, isinstance(net, Steppable)
        self.state = net.init_state(frame) if isinstance(net, Steppable) else None

    def __call__(self, frame: Tensor) -> None:
        with torch.inference_mode():
            if self.has_state:
                _, self.state = self.net.step(frame, self.state)  # type: ignore[operator]
            else:
                self.net(frame)


def until(deadline: float, work: Callable[[], None], spent: list[float]) -> None:
    """Work until the time is over, once at least, and note how long each piece took."""
    while (began := time.perf_counter()) < deadline or not spent:
        work()
        spent.append(time.perf_counter() - began)


def a_thread_per_stream(net: nn.Module, frame: Tensor, num: int, seconds: float) -> Measured:
    torch.set_num_threads(1)
    spent: list[list[float]] = [[] for _ in range(num)]
    begin = threading.Barrier(num + 1)
    deadline = [0.0]

    def work(own: list[float]) -> None:
        torch.set_num_threads(1)
        step = Steps(net, frame)
        begin.wait()
        until(deadline[0], lambda: step(frame), own)

    threads = [threading.Thread(target=work, args=(own,)) for own in spent]
    for thread in threads:
        thread.start()
    while begin.n_waiting < num:  # all have their state
        time.sleep(0.001)
    began = time.perf_counter()
    deadline[0] = began + seconds
    begin.wait()
    for thread in threads:
        thread.join()
    every = [s for own in spent for s in own]
    return len(every) / (time.perf_counter() - began), median(every)


def one_after_the_other(net: nn.Module, frame: Tensor, num: int, seconds: float, *, cores: int) -> Measured:
    torch.set_num_threads(cores)
    steps, spent = [Steps(net, frame) for _ in range(num)], []
    began = time.perf_counter()

    def all_of_them() -> None:
        for step in steps:
            step(frame)

    until(began + seconds, all_of_them, spent)
    return num * len(spent) / (time.perf_counter() - began), median(spent)


def one_batch(net: nn.Module, frame: Tensor, num: int, seconds: float, *, cores: int) -> Measured:
    torch.set_num_threads(cores)
    batch, spent = torch.cat([frame] * num), []
    began = time.perf_counter()
    until(began + seconds, lambda: Steps(net, batch)(batch), spent)
    return num * len(spent) / (time.perf_counter() - began), median(spent)


def ours(circuit: Any, frame: Tensor, num: int, seconds: float) -> Measured:
    from sidestream.engine import run_many

    torch.set_num_threads(1)
    deadline = time.perf_counter() + seconds

    def frames() -> Iterator[Tensor]:
        yield frame
        while time.perf_counter() < deadline:
            yield frame

    began, inside = time.perf_counter(), []
    for output in run_many(circuit, {str(n): frames() for n in range(num)}):
        inside.append(output.latency_seconds)
    return len(inside) / (time.perf_counter() - began), median(inside)


def candidates_of(name: str) -> dict[str, Callable[[int, float], Measured]]:
    """What is measured: ``measure(number of streams, seconds)``."""
    import sidestream as ss
    from sidestream.models.info import info_of
    from sidestream.models.on_stream import net_on_stream
    from sidestream.report.measure import num_cores

    torch.manual_seed(0)
    made = ss.create_model(name).eval()
    info = info_of(made)
    assert info is not None
    # its own stream takes every frame; net_on_stream would leave out those that the model was not made for
    net = made.streaming() if hasattr(made, "streaming") else net_on_stream(made, info)[0]
    frame, cores = torch.rand(1, 3, 224, 224), num_cores()
    found: dict[str, Callable[[int, float], Measured]] = {
        BASE: lambda num, s: a_thread_per_stream(net, frame, num, s),
        "one after the other, all cores": lambda num, s: one_after_the_other(net, frame, num, s, cores=cores),
    }
    if not Steps(net, frame).has_state:
        found["one batch, all cores"] = lambda num, s: one_batch(net, frame, num, s, cores=cores)
    for num_stages in (1, 2, 4):
        circuit = ss.pipelined(ss.cut(net, frame, num_stages=num_stages))
        title = "run_many, whole model" if num_stages == 1 else f"run_many, {num_stages} stages"
        found[title] = lambda num, s, c=circuit: ours(c, frame, num, s)  # type: ignore[misc]
    return found


def main() -> None:
    from rich.progress import track

    from sidestream.report.measure import machine
    from sidestream.report.record import json_lines, write_text

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one model, 1 and 4 streams, one pass; prints only")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    models, counts, passes = (MODELS[:1], (1, 4), 1) if args.quick else (args.models, STREAMS, args.passes)
    made = {name: candidates_of(name) for name in models}
    chance = random.Random(0)
    cases: list[tuple[str, int, str]] = []
    for _ in range(passes):
        for name in models:
            for num in counts:
                cases += [(name, num, title) for title in chance.sample(list(made[name]), len(made[name]))]
    found: dict[tuple[str, int, str], list[Measured]] = defaultdict(list)
    for name, num, title in track(cases, description="measuring"):
        made[name][title](num, 0.3)
        found[name, num, title].append(made[name][title](num, args.seconds))
    text = "\n".join(_table(name, list(made[name]), counts, found) for name in models)
    print(text)
    if args.quick:
        return
    with json_lines(HERE / "results.jsonl") as write:
        for (name, num, title), values in found.items():
            write({"model": name, "streams": num, "candidate": title, "measured": values, "machine": machine()})
    write_text(HERE / "table.md", text)


def _table(name: str, titles: list[str], counts: tuple[int, ...], found: dict[Any, list[Measured]]) -> str:
    heads = " | ".join(f"{num} stream{'s' * (num > 1)}" for num in counts)
    lines = [f"### {name}", "", f"| candidate | {heads} |", f"| --- |{' --- |' * len(counts)}"]
    for title in titles:
        cells = []
        for num in counts:
            values, base = found[name, num, title], found[name, num, BASE]
            ratios = [a[0] / b[0] for a, b in zip(values, base, strict=True)]
            speed, inside = median(v[0] for v in values), 1e3 * median(v[1] for v in values)
            spread = "" if title == BASE else f", {median(ratios):.2f}x [{min(ratios):.2f} – {max(ratios):.2f}]"
            cells.append(f"{speed:.1f}/s{spread}, {inside:.0f} ms")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
