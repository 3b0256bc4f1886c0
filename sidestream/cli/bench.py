"""``sidestream bench``: every way to run a model on this machine, measured side by side."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import tyro

from sidestream.cli.plan import ModelFlags, load_model, parse_num_stages


def bench(
    model: Annotated[str, tyro.conf.Positional] = "efficientnet_lite0",
    stages: str = "auto",
    backends: tuple[str, ...] = ("auto",),
    seconds: float = 3.0,
    json: Path | None = None,
) -> int:
    """Time a model with each back end: frame by frame, frame-parallel and pipelined.

    Random weights, batch 1, the model's own input size; each candidate runs on one repeated frame.

    Args:
        model: a name from `sidestream models`.
        stages: number of stages, or auto.
        backends: eager, inductor, onnxruntime, openvino; or auto for all that are quick to build.
        seconds: time for each candidate.
        json: file to append one JSON line per candidate to.
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from sidestream.engine.tune import tune
    from sidestream.errors import InputError
    from sidestream.report.measure import machine
    from sidestream.report.record import json_lines
    from sidestream.report.words import counted

    if seconds <= 0:
        raise InputError(f"--seconds {seconds:g}; expected more than 0")
    net, _, spec = load_model(ModelFlags(model, weights="random"))
    example = torch.rand(1, 3, *spec.size_px)
    console = Console()
    with Console(stderr=True).status("starting") as status:
        found = tune(
            net,
            example,
            num_stages=parse_num_stages(stages),
            backends="auto" if backends == ("auto",) else backends,
            seconds=seconds,
            on_progress=status.update,
        )
    slowest = min(t.frames_per_second for t in found.trials)
    table = Table(title=f"{model}, batch 1, {spec.size_px[0]} x {spec.size_px[1]} px")
    for title in ("candidate", "frames/s", "ratio to slowest", "latency ms"):
        table.add_column(title, justify="left" if title == "candidate" else "right")
    for t in found.trials:
        ratio = t.frames_per_second / slowest
        table.add_row(t.name, f"{t.frames_per_second:.1f}", f"{ratio:.2f}", f"{t.latency_seconds * 1e3:.1f}")
    console.print(table)
    console.print(f"fastest: {found.backend}, {counted(found.circuit.num_stages, 'stage')}, {found.executor}")
    with contextlib.ExitStack() as files:
        if json is not None:
            write = files.enter_context(json_lines(json, append=True))
            for t in found.trials:
                figures = {"frames_per_second": t.frames_per_second, "latency_seconds": t.latency_seconds}
                write({"model": model, "candidate": t.name, **figures, "machine": machine()})
    return 0
