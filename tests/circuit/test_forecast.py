"""The what-if report against hand counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from random_circuits import random_stages
from sidestream.circuit.forecast import forecast, register_bytes
from sidestream.circuit.stage import Stages
from sidestream.circuit.wiring import parallel, pipelined, semi_parallel, sequential, with_periods
from sidestream.errors import CircuitError


def stages_of(costs_seconds: list[float | None]) -> Stages:
    """A chain of one-output stages of given costs whose values are 5 float64."""
    value = torch.zeros(5, dtype=torch.float64)
    made = random_stages(0, len(costs_seconds), skip_chance=0.0)
    fields = [
        {"cost_seconds": c, "output_bytes": (40,) * s.num_outputs, "example_inputs": (value,) * s.num_inputs}
        for c, s in zip(costs_seconds, made, strict=True)
    ]
    return made.with_stages(tuple(replace(s, **f) for s, f in zip(made, fields, strict=True)))


def test_throughput_is_bounded_by_the_largest_stage_and_by_the_workers() -> None:
    stages = stages_of([0.01, 0.04, 0.01, 0.02])
    assert forecast(pipelined(stages), num_workers=8).frames_per_second == pytest.approx(1 / 0.04)
    assert forecast(pipelined(stages), num_workers=2).frames_per_second == pytest.approx(1 / 0.04)
    assert forecast(pipelined(stages), num_workers=1).frames_per_second == pytest.approx(1 / 0.08)
    assert forecast(sequential(stages), num_workers=4).frames_per_second == pytest.approx(1 / 0.08)
    grouped = semi_parallel(stages, groups=[2, 2])  # two frames inside: no more than two stages at work
    assert forecast(grouped, num_workers=4).frames_per_second == pytest.approx(1 / 0.04)
    assert forecast(semi_parallel(stages, groups=1), num_workers=4).frames_per_second == pytest.approx(1 / 0.08)
    with pytest.raises(CircuitError, match="0 workers"):
        forecast(grouped, num_workers=0)
    assert forecast(pipelined(stages), num_workers=4).largest_stage == "s2"
    assert forecast(pipelined(stages), num_workers=4).latency_seconds == pytest.approx(0.08)


def test_slow_clocks_cost_their_share() -> None:
    circuit = with_periods(pipelined(stages_of([0.01, 0.04, 0.04])), (1, 2, 4))
    assert forecast(circuit, num_workers=1).frames_per_second == pytest.approx(1 / (0.01 + 0.02 + 0.01))


def test_registers_are_counted_once_per_output_for_its_longest_wire() -> None:
    stages = stages_of([0.01] * 5)
    wires = pipelined(stages).wires
    longest: dict[tuple[int, int], int] = {}
    for w in wires:
        longest[w.source, w.output] = max(longest.get((w.source, w.output), 0), w.delay)
    assert register_bytes(pipelined(stages)) == 40 * sum(longest.values())
    assert register_bytes(sequential(stages)) == 0


def test_unknown_costs_stay_unknown() -> None:
    report = forecast(parallel(stages_of([0.01, None])), num_workers=2)
    assert report.frames_per_second is None
    assert report.latency_seconds is None
    assert "predicted" not in str(report)
    assert report.latency_ticks == 1


def test_the_report_in_words() -> None:
    text = str(forecast(pipelined(stages_of([0.01, 0.01])), num_workers=2))
    assert "2 stages, pipelined, 2 workers" in text
    assert "predicted 100.0 frames/s (2.00x one thread), latency 20.0 ms" in text
