"""Models with memory on a CPU: frames per second of one live stream, against what a user would write.

    python benchmarks/stateful_cpu/run.py                    # --quick for a look: one model, one pass, quiet only
    python benchmarks/stateful_cpu/run.py --models cnn_convgru --passes 3

Batch 1, float32, the model's own frame size. Rivals (``rivals.py``): the step in eager on 1 and on all threads,
through ``torch.compile``, and exported once with its state as inputs and outputs, in ONNX Runtime and OpenVINO, each
with 1 and with all threads. Ours: 1, 2, 4 and 8 stages under ``threads`` on eager, ONNX Runtime and OpenVINO, and
``tune``. Each candidate runs once per pass, in another order each time, quiet and with one core busy; ratios are taken
within a pass. A model whose lines are in results.jsonl is not measured again. Writes results.jsonl and table.md here.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import rivals
import torch

HERE = Path(__file__).parent
CONDITIONS = ("quiet", "busy")
MODELS = (
    "tsm_resnet50_online", "tsm_mobilenet_v2_online", "cnn_lstm", "cnn_convgru", "r2plus1d_18_causal", "i3d_causal",
    "timesformer_divided_causal", "x3d_xs",
)  # fmt: skip
STAGES = (1, 2, 4, 8)
BACKENDS = ("eager", "onnxruntime", "openvino")
BASE = "step in eager, 1 thread"
Measure = Callable[[float], float]
"""Frames per second over so many seconds."""


def ticking(tick: rivals.Tick, seconds: float) -> float:
    began, num = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        tick()
        num += 1
    return num / spent


def running(circuit: Any, frame: torch.Tensor, seconds: float, executor: str = "threads") -> float:
    from sidestream.engine import run

    torch.set_num_threads(1)
    deadline, num = [float("inf")], [0]

    def frames() -> Iterator[torch.Tensor]:
        while time.perf_counter() < deadline[0]:
            num[0] += 1
            yield frame

    deadline[0] = time.perf_counter() + seconds
    began = time.perf_counter()
    for _ in run(circuit, frames(), executor=executor):
        pass
    return num[0] / (time.perf_counter() - began)


def candidates_of(name: str, say: Callable[[str], None]) -> dict[str, Measure]:
    """What can be measured; what cannot be made is said and left out."""
    import sidestream as ss
    from sidestream.engine.backends import cut_for_backend
    from sidestream.models.info import info_of
    from sidestream.models.on_stream import net_on_stream
    from sidestream.report.measure import num_cores

    torch.manual_seed(0)
    made = ss.create_model(name).eval()
    info = info_of(made)
    assert info is not None
    size = info.input_spec.size_px
    # its own stream takes every frame; net_on_stream would leave out those that the model was not made for
    stream = made.streaming() if hasattr(made, "streaming") else net_on_stream(made, info)[0]
    frame, cores = torch.rand(1, 3, *size), num_cores()
    found: dict[str, Measure] = {}

    def add(title: str, make: Callable[[], Measure]) -> None:
        say(f"{name}: {title}")
        try:
            found[title] = make()
        except Exception as error:
            print(f"{name}, {title}: not measured ({type(error).__name__}: {str(error).splitlines()[0][:160]})")

    for threads in (1, cores):
        words = f"{threads} thread{'s' * (threads > 1)}"
        add(f"step in eager, {words}", lambda n=threads: partial(ticking, rivals.eager(stream, frame, n)))  # type: ignore[misc]
    if stream.period_ticks == 1:
        add("step through torch.compile", lambda: partial(ticking, rivals.compiled(stream, frame, cores)))
        exported: list[Any] = []
        for title, start in (("ONNX Runtime", rivals.onnxruntime_step), ("OpenVINO", rivals.openvino_step)):
            for threads in (1, cores):

                def make(start: Any = start, threads: int = threads) -> Measure:
                    if not exported:
                        exported.append(rivals.onnx_of(stream, frame))
                    return partial(ticking, start(*exported[0], frame, threads))

                add(f"exported step, {title}, {threads} thread{'s' * (threads > 1)}", make)
    for backend in BACKENDS:
        for num in STAGES:

            def cut(backend: str = backend, num: int = num) -> Measure:
                stages = cut_for_backend(stream, frame, backend, num_stages=num)
                return partial(running, ss.pipelined(stages), frame)

            add(f"{num} stage{'s' * (num > 1)}, {backend}", cut)

    def tuned() -> Measure:
        choice = ss.tune(stream, frame)
        print(f"{name}, tune: {choice.backend} in {len(choice.circuit)} stages, {choice.executor}")
        return partial(running, choice.circuit, frame, executor=choice.executor)

    add("tune", tuned)
    return found


def main() -> None:
    from rich.console import Console

    from sidestream.report.measure import machine

    sys.path.append(str(HERE.parent / "depth_parallel_cpu"))
    from conditions import OthersShare, condition

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one model, one pass, quiet only; prints only")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    models, passes, conditions = args.models, args.passes, CONDITIONS
    if args.quick:
        models, passes, conditions = args.models[:1] if args.models != list(MODELS) else ["cnn_convgru"], 1, ("quiet",)
    path, chance = HERE / "results.jsonl", random.Random(0)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() and not args.quick else []
    done = {line["model"] for line in lines}
    console = Console(stderr=True)
    for name in models:
        if name in done:
            continue
        with console.status("making") as status:
            made = candidates_of(name, status.update)
            for number in range(passes):
                for where in conditions:
                    for title in chance.sample(list(made), len(made)):
                        status.update(f"{name}, pass {number + 1} of {passes}, {where}: {title}")
                        made[title](0.4)
                        with condition(where) as spinners:
                            others = OthersShare(spinners)
                            speed = made[title](args.seconds)
                            record = {"model": name, "candidate": title, "condition": where, "pass": number}
                            lines.append({**record, "frames_per_second": speed, "others_cores": others.cores()})
        if not args.quick:
            own = [line for line in lines if line["model"] == name]
            with path.open("a") as file:
                for line in own:
                    file.write(json.dumps({**line, "machine": machine()}) + "\n")
    text = "\n".join(table(name, lines) for name in dict.fromkeys(line["model"] for line in lines))
    print(text)
    if not args.quick:
        (HERE / "table.md").write_text(text)


def table(name: str, lines: list[dict[str, Any]]) -> str:
    """Markdown of one model, the fastest first."""
    speeds: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for line in lines:
        if line["model"] == name:
            speeds[line["candidate"], line["condition"]][line["pass"]] = line["frames_per_second"]
    conditions = [c for c in CONDITIONS if any(where == c for _, where in speeds)]
    titles = sorted({t for t, _ in speeds}, key=lambda t: -median(speeds[t, conditions[0]].values()))
    heads = " | ".join(f"{c}: frames/s | {c}: x {BASE}" for c in conditions)
    rows = [f"### {name}", "", f"| candidate | {heads} |", f"| --- |{' ---: | ---: |' * len(conditions)}"]
    for title in titles:
        cells = []
        for where in conditions:
            own, base = speeds[title, where], speeds[BASE, where]
            ratios = [own[n] / base[n] for n in own if n in base]
            spread = f"{median(ratios):.2f} [{min(ratios):.2f} – {max(ratios):.2f}]" if ratios else ""
            cells.append(f"{median(own.values()):.1f} | {spread}")
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
