"""Temporal filters: against a causal 3D convolution with the same weights, and against the circuit without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sidestream.circuit.ages import information_latency_ticks, latency_ticks
from sidestream.circuit.build_stages import stage_of, stages_of
from sidestream.circuit.stage import Stages
from sidestream.circuit.temporal_filter import wider_by_zeros, with_temporal_filter
from sidestream.circuit.wiring import parallel, pipelined, sequential
from sidestream.engine.run import run
from sidestream.engine.unroll import unroll
from sidestream.errors import CircuitError, CutError

FRAME = torch.zeros(2, 3, 5, 5, dtype=torch.float64)


def row(seed: int = 0) -> Stages:
    torch.manual_seed(seed)
    convs = [nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 4), (4, 6), (6, 2))]
    return stages_of([nn.Sequential(c, nn.Tanh()).double() for c in convs], FRAME)


def clip(num_frames: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, num_frames, *FRAME.shape[1:], generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("taps", [1, 2, 3])
@pytest.mark.parametrize("wiring", [sequential, pipelined])
def test_a_filter_is_a_causal_convolution_over_time(taps: int, wiring: object) -> None:
    stages = row()
    first, middle, last = (s.module for s in stages)
    circuit = with_temporal_filter(wiring(stages), 2, taps=taps)  # type: ignore[operator]
    conv2d: nn.Conv2d = middle[0]
    assert conv2d.weight.shape[1] == 4 * taps
    nn.init.normal_(conv2d.weight, std=0.2)
    frames = clip()
    conv3d = nn.Conv3d(4, 6, (taps, 3, 3), padding=(0, 1, 1)).double()
    with torch.no_grad():
        for k in range(taps):  # the newest tap is the last one in time
            conv3d.weight[:, :, taps - 1 - k] = conv2d.weight[:, 4 * k : 4 * (k + 1)]
        conv3d.bias.copy_(conv2d.bias)  # type: ignore[union-attr]
        h = torch.stack([first(x) for x in frames.unbind(1)], 2)
        expected = torch.stack([last(x.tanh()) for x in conv3d(h).unbind(2)], 1)
    found = unroll(circuit, frames, drain=False)
    torch.testing.assert_close(found.answers, expected[:, : len(found.ticks)], rtol=1e-10, atol=1e-12)
    assert latency_ticks(circuit) - information_latency_ticks(circuit) == taps - 1
    assert latency_ticks(circuit) == latency_ticks(wiring(stages)) + taps - 1  # type: ignore[operator]
    answers = list(run(circuit, frames.unbind(1), executor="inline"))
    for n, tick in enumerate(found.ticks):
        assert answers[n].tick == tick
        assert answers[n].newest_frame_index - answers[n].oldest_frame_index == taps - 1
        torch.testing.assert_close(answers[n].value.clone(), expected[:, n], rtol=1e-10, atol=1e-12)


def test_new_weights_begin_at_zero_so_nothing_changes_and_they_learn() -> None:
    plain = unroll(parallel(row()), clip(), drain=False)
    circuit = with_temporal_filter(with_temporal_filter(parallel(row()), 1, taps=3), 3, taps=2)
    found = unroll(circuit, clip(), drain=False)
    assert latency_ticks(circuit) == 2 + 2 + 1
    torch.testing.assert_close(found.answers, plain.answers[:, 3:], rtol=1e-12, atol=1e-13)
    found.answers.square().sum().backward()
    weight = circuit.stages[0].module.module[0].weight
    assert weight.shape[1] == 9
    assert not weight[:, 3:].any()
    assert (weight.grad[:, 3:].flatten(1).norm(dim=1) > 0).all()


def test_stages_with_several_inputs_are_filtered_input_by_input() -> None:
    class Join(nn.Module):
        def forward(self, trunk: Tensor, skip: Tensor) -> Tensor:
            return torch.cat([trunk.mean(1), skip.mean(1)], 1)

    stages = stages_of([nn.Identity(), nn.Conv2d(3, 2, 1).double(), nn.Conv2d(2, 2, 1).double()], FRAME, skips="none")
    joined = stage_of(Join(), (FRAME[:, :2], FRAME[:, :3]))
    from dataclasses import replace

    from sidestream.circuit.stage import Link

    links = (Link(0, 0, 1, 0), Link(1, 0, 2, 0), Link(2, 0, 3, 0), Link(1, 0, 3, 1), Link(3, 0, 4, 0))
    circuit = pipelined(replace(stages, stages=(stages[0], stages[1], joined), links=links))
    with pytest.raises(CircuitError, match="has 2 inputs"):
        with_temporal_filter(circuit, 3)
    filtered = with_temporal_filter(circuit, 3, widen=False)
    frames = clip()
    found = unroll(filtered, frames, drain=False).answers
    trunk = torch.stack([stages[1].module(x) for x in frames.unbind(1)], 1)
    for n in range(found.shape[1]):
        pairs = [torch.cat([v[:, n + 1], v[:, n]], 1).mean(1) for v in (trunk, frames)]
        torch.testing.assert_close(found[:, n], torch.cat(pairs, 1), rtol=1e-12, atol=1e-13)


def test_refusals() -> None:
    with pytest.raises(CircuitError, match="expected a stage from 1 to 3"):
        with_temporal_filter(parallel(row()), 4)
    with pytest.raises(CutError, match="no Conv2d or Linear"):
        wider_by_zeros(nn.Tanh(), 3)
