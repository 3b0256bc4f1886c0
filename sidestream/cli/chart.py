"""``sidestream chart``: which stage works on which frame in which tick, and what to expect, before anything runs."""

from __future__ import annotations

from pathlib import Path

from sidestream.cli.plan import ModelFlags, load_model, parse_num_stages
from sidestream.cli.run import check_target


def chart(
    model: str = "efficientnet_lite0",
    stages: str | None = None,
    cut: tuple[str, ...] = (),
    wiring: str = "pipelined",
    ticks: int = 10,
    threads: int | None = None,
    out: Path | None = None,
) -> int:
    """Draw the schedule of a cut model and predict its throughput, latency and register memory.

    Args:
        model: a name from `sidestream models` (weights do not matter here).
        stages: number of stages, or auto (default: 4, or as many as --cut names).
        cut: dotted names of modules at which stages begin, instead of a balanced cut.
        wiring: sequential, pipelined, parallel, or semi-parallel:G.
        ticks: how many ticks to draw.
        threads: workers to predict for (default: all cores).
        out: PNG to write.
    """
    import torch

    from sidestream.circuit.chart import chart as chart_text
    from sidestream.circuit.chart import chart_png
    from sidestream.circuit.cut import cut as cut_model
    from sidestream.circuit.forecast import forecast
    from sidestream.circuit.wiring import wire
    from sidestream.engine.run import num_cores
    from sidestream.errors import InputError

    if threads is not None and threads < 1:
        raise InputError(f"--threads {threads}; expected 1 or more")
    if ticks < 1:
        raise InputError(f"--ticks {ticks}; expected 1 or more")
    num_stages = parse_num_stages(stages or ("auto" if cut else "4"))
    check_target("--out", out, "")
    net, _, spec = load_model(ModelFlags(model, weights="random"))
    name = model.rpartition("/")[2]
    parts = cut_model(net, torch.rand(1, 3, *spec.size_px), num_stages=num_stages, cut=cut or None, name=name)
    circuit = wire(parts, wiring)
    print(chart_text(circuit, num_ticks=ticks))
    print()
    print(forecast(circuit, num_workers=threads or num_cores()))
    if out is not None:
        print(f"wrote {chart_png(circuit, out, num_ticks=ticks)}")
    return 0
