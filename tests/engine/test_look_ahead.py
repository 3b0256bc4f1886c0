"""Chains that look ahead or swallow frames, depth-parallel: every answer is the clip form's, and names its frame."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from contract import check_executor
from sidestream.circuit.ages import latency_ticks, look_ahead_ticks
from sidestream.circuit.cut import cut
from sidestream.circuit.wiring import pipelined, sequential
from sidestream.engine import run
from sidestream.nn.combine import Chain, PerFrame
from sidestream.nn.conv3d import CausalConv3d, Conv3d
from sidestream.nn.pool import MaxPool3d


def same(channels: int) -> Conv3d:
    return Conv3d(3, channels, 3, padding=1)


CHAINS: dict[str, Callable[[], Chain]] = {
    "causal": lambda: Chain(CausalConv3d(3, 3, 3, padding=1), PerFrame(nn.Tanh()), CausalConv3d(3, 2, 2)),
    "look-ahead": lambda: Chain(same(3), PerFrame(nn.Tanh()), same(3), same(3)),
    "stride": lambda: Chain(
        CausalConv3d(3, 3, 3, stride=(2, 1, 1), padding=1), PerFrame(nn.Tanh()), CausalConv3d(3, 2, 2)
    ),
    "stride, then look-ahead": lambda: Chain(Conv3d(3, 3, 3, stride=2, padding=1), PerFrame(nn.Tanh()), same(3)),
    "two strides": lambda: Chain(same(3), MaxPool3d((2, 1, 1)), same(3), MaxPool3d((2, 1, 1)), same(3)),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("num_frames", [5, 8, 13])
@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_answers_are_those_of_the_clip_form(name: str, num_frames: int, num_stages: int) -> None:
    torch.manual_seed(0)
    chain = CHAINS[name]().double().eval()
    clip_BTCHW = torch.randn(1, num_frames, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        expected = chain(clip_BTCHW)
    stages = cut(chain, clip_BTCHW[:, 0], num_stages=num_stages, costs="uniform")
    for wiring in (sequential, pipelined):
        circuit = wiring(stages)
        assert look_ahead_ticks(circuit) == chain.delay_ticks
        for executor in ("inline", "threads"):
            outputs = list(run(circuit, list(clip_BTCHW.unbind(1)), executor=executor))
            assert [o.frame_index for o in outputs] == [n * chain.period_ticks for n in range(expected.shape[1])]
            for output, answer in zip(outputs, expected.unbind(1), strict=True):
                torch.testing.assert_close(output.value.clone(), answer, rtol=1e-12, atol=1e-12)
                assert output.age_ticks == latency_ticks(circuit) + chain.delay_ticks


@pytest.mark.parametrize("name", ["causal", "look-ahead"])
def test_threads_equals_inline_to_the_bit(name: str) -> None:
    chain = CHAINS[name]().eval()
    frames = list(torch.randn(9, 1, 3, 4, 4))
    check_executor("threads", pipelined(cut(chain, frames[0], num_stages=3, costs="uniform")), frames, num_threads=3)


def test_stages_work_in_parallel_although_answers_wait_for_later_frames() -> None:
    """More frames than workers must come in, since the first answer needs the look-ahead's."""
    chain = CHAINS["look-ahead"]().eval()
    frames = list(torch.randn(12, 1, 3, 4, 4))
    circuit = pipelined(cut(chain, frames[0], num_stages=3, costs="uniform"))
    for limit in (1, 2, None):
        outputs = list(run(circuit, frames, executor="threads", num_threads=2, max_in_flight=limit))
        assert len(outputs) == 12
