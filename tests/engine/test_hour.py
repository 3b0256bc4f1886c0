"""An hour of stream through the whole path: synthetic frames, prepare, a cut model, threads. Memory stays flat."""

from __future__ import annotations

import psutil
import pytest
import torch
from torch import nn

from sidestream.circuit.cut import cut
from sidestream.circuit.wiring import pipelined
from sidestream.engine import run
from sidestream.types import InputSpec
from sidestream.video import stream

MIB = 2**20


def answer_frames(num_frames: int) -> list[int]:
    """Resident memory after each tenth of the run, in bytes; checks that every frame is answered in order."""
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=4), nn.Flatten(), nn.Linear(4 * 49, 5)]
    spec = InputSpec(size_px=(32, 32))
    stages = cut(nn.Sequential(*layers).eval(), torch.rand(1, 3, 32, 32), num_stages=3, costs="uniform")
    process, sizes = psutil.Process(), []
    with stream("synthetic:size=48x48,objects=1", max_frames=num_frames) as frames:
        for expected, output in enumerate(run(pipelined(stages), frames, prepare=spec, executor="threads")):
            assert output.frame_index == expected
            if (expected + 1) % (num_frames // 10) == 0:
                sizes.append(process.memory_info().rss)
    assert expected == num_frames - 1
    return sizes


def test_two_minutes_keep_memory_flat() -> None:
    sizes = answer_frames(3000)
    assert max(sizes[2:]) - sizes[1] < 30 * MIB


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_hour_keeps_memory_flat() -> None:
    sizes = answer_frames(90_000)
    assert max(sizes[2:]) - sizes[1] < 30 * MIB
