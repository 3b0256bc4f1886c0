"""What a circuit will do, before it runs: throughput, latency and register memory from measured stage costs.

With costs c_j, periods p_j and W workers that take whichever stage is ready:

    seconds per frame  >=  max(largest c_j / p_j,        no stage is on two frames at once
                               sum of c_j / p_j / W,     a worker does one thing at a time
                               sum of c_j / p_j / F)     no more frames are inside than F = latency in ticks + 1
    latency            >=  sum of c_j                    one frame's own way through, stages one after the other
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sidestream.circuit.ages import information_latency_ticks, latency_ticks
from sidestream.circuit.wire import Circuit
from sidestream.errors import CircuitError
from sidestream.report.words import counted


@dataclass(frozen=True)
class Forecast:
    """Predicted figures of a circuit; None where the stage costs or sizes are not known."""

    wiring: str
    num_stages: int
    num_workers: int
    latency_ticks: int
    information_latency_ticks: int
    frames_per_second: float | None
    latency_seconds: float | None
    sequential_frames_per_second: float | None
    largest_stage: str | None
    register_bytes: int | None

    def __str__(self) -> str:
        lines = [
            f"{counted(self.num_stages, 'stage')}, {self.wiring}, {counted(self.num_workers, 'worker')}",
            f"latency {counted(self.latency_ticks, 'tick')}; a frame first counts after "
            f"{counted(self.information_latency_ticks, 'tick')}",
        ]
        if self.frames_per_second and self.sequential_frames_per_second and self.latency_seconds is not None:
            gain = self.frames_per_second / self.sequential_frames_per_second
            lines.append(
                f"predicted {self.frames_per_second:.1f} frames/s ({gain:.2f}x one thread), "
                f"latency {self.latency_seconds * 1e3:.1f} ms, slowest stage {self.largest_stage}"
            )
        if self.register_bytes is not None:
            lines.append(f"registers {self.register_bytes / 2**20:.2f} MiB")
        return "\n".join(lines)


def forecast(circuit: Circuit, *, num_workers: int) -> Forecast:
    """Predict from the stages' measured costs. Optimistic: no hand-over costs, one free core per worker."""
    costs = [s.cost_seconds for s in circuit.stages]
    known = [c for c in costs if c is not None]
    is_known = len(known) == len(costs) and sum(known) > 0
    rates = [c / p for c, p in zip(known, circuit.periods, strict=False)] if is_known else []
    if num_workers < 1:
        raise CircuitError(f"cannot plan for {num_workers} workers; give 1 or more")
    workers = min(num_workers, circuit.num_stages, latency_ticks(circuit) + 1)
    period = max(*rates, sum(rates) / workers) if rates else None
    return Forecast(
        wiring=circuit.wiring,
        num_stages=circuit.num_stages,
        num_workers=workers,
        latency_ticks=latency_ticks(circuit),
        information_latency_ticks=information_latency_ticks(circuit),
        frames_per_second=1 / period if period else None,
        latency_seconds=sum(known) if is_known else None,
        sequential_frames_per_second=1 / sum(known) if is_known else None,
        largest_stage=circuit.stages[rates.index(max(rates))].name if rates else None,
        register_bytes=register_bytes(circuit),
    )


def register_bytes(circuit: Circuit) -> int | None:
    """Memory of the registers: a value per tick of delay on every output, as long as its longest wire needs it."""
    longest: dict[tuple[int, int], tuple[int, int]] = {}
    for number in range(1, circuit.num_stages + 2):
        for wire in circuit.wires_into(number):
            size = _bytes(circuit, wire.source, wire.output, number, wire.input)
            if size is None:
                return None
            delay = max(wire.delay, longest.get((wire.source, wire.output), (0, 0))[0])
            longest[wire.source, wire.output] = (delay, size)
    return sum(delay * size for delay, size in longest.values())


def _bytes(circuit: Circuit, source: int, output: int, target: int, input: int) -> int | None:
    if source > 0:
        sizes = circuit.stages[source - 1].output_bytes
        return None if sizes is None else sizes[output]
    if target > circuit.num_stages:
        return 0  # from the source straight to the answer
    examples = circuit.stages[target - 1].example_inputs
    return None if examples is None else value_bytes(examples[input])


def value_bytes(value: Any) -> int:
    """Size of a flat value in memory; 0 for what is no tensor."""
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
