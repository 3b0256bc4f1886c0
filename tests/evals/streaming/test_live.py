"""Runs: a live run on a held clock is the simulator's schedule; offline and simulated runs answer what they should."""

from __future__ import annotations

import time
from itertools import pairwise, repeat
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sidestream as ss
from sidestream.circuit.wire import Circuit
from sidestream.clock import ManualClock
from sidestream.errors import InputError, SourceError
from sidestream.evals.streaming import (
    Classes,
    at_rate,
    one_device,
    record_profile,
    run_live,
    run_offline,
    run_simulated,
    scheduled_answers,
)
from sidestream.nn.combine import Chain
from sidestream.nn.steppable import Steppable
from sidestream.types import Frame, Output

RATE = 25.0


class Bright(nn.Module):
    """(B, 3, H, W) -> (B, 2): the mean level of the frame and its negative."""

    def forward(self, frame_BCHW: Tensor) -> Tensor:
        level_B1 = frame_BCHW.mean((1, 2, 3))[:, None]
        return torch.cat([level_B1, -level_B1], dim=1)


class Summed(Steppable):
    """The sum of all levels so far: what it answers depends on which frames it was fed."""

    def init_state(self, frame_BCHW: Tensor) -> Any:
        return torch.zeros(frame_BCHW.shape[0], 1)

    def step(self, frame_BCHW: Tensor, state: Any) -> tuple[Any, Any]:
        state = state + frame_BCHW.mean((1, 2, 3))[:, None]
        return state, state

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return clip_BTCHW.mean((2, 3, 4)).cumsum(1)[..., None]


def circuit_of(model: nn.Module) -> Circuit:
    return ss.sequential(ss.cut(model.eval(), torch.zeros(1, 3, 4, 4), num_stages=1))


def clip(num_frames: int) -> list[Frame]:
    """Frame n has the level n."""
    return at_rate((Frame(torch.full((4, 4, 3), n, dtype=torch.uint8), n, n / 7) for n in range(num_frames)), RATE)


def level(output: Output) -> Classes:
    """The answer in levels: the mean (or the sum) of frames n is n."""
    return Classes(((0, round(float(output.value[0, 0]) * 255.0, 3)),))


def images(frame: Frame) -> Tensor:
    return frame.image_BCHW


@pytest.mark.parametrize("runtime_frames", [0.5, 1.29, 2.47])
@pytest.mark.parametrize("model", [Bright, Summed])
def test_a_live_run_on_a_held_clock_is_the_schedule_of_a_device_that_never_waits(model, runtime_frames):
    clock = ManualClock(100.0)

    def busy(frame: Frame) -> Tensor:
        clock.advance(runtime_frames / RATE)
        return frame.image_BCHW

    circuit = circuit_of(Chain(model()) if model is Summed else model())
    live = run_live(circuit, clip(30), answer=level, clip="c", executor="inline", clock=clock, prepare=busy)
    works = one_device(30, repeat(runtime_frames))
    assert [a.frame_index for a in live] == [w.frame_index for w in works]
    for a, work in zip(live, works, strict=True):
        assert a.ready_seconds == pytest.approx(work.ready / RATE, abs=1e-9)
        assert a.arrived_seconds == pytest.approx(a.pts_seconds, abs=1e-9)
        assert a.pts_seconds == work.frame_index / RATE
    simulated = run_simulated(circuit, clip(30), works, frame_rate=RATE, answer=level, clip="c", prepare=images)
    assert [a.value for a in simulated] == [a.value for a in live]
    assert [a.ready_seconds for a in simulated] == [float(w.ready) / RATE for w in works]
    sums = torch.tensor([w.frame_index for w in works]).cumsum(0).tolist()
    expected = sums if model is Summed else [w.frame_index for w in works]
    assert [a.value.top[0][1] for a in live] == pytest.approx(expected, abs=2e-3)


def test_offline_every_frame_is_answered_at_its_own_time_whatever_the_wiring():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), Bright()).eval()
    stages = ss.cut(model, torch.zeros(1, 3, 4, 4), num_stages=3)
    logs = [
        run_offline(w(stages), clip(9), answer=level, clip="c", prepare=images) for w in (ss.sequential, ss.pipelined)
    ]
    assert logs[0] == logs[1]
    assert [(a.frame_index, a.ready_seconds) for a in logs[0]] == [(n, n / RATE) for n in range(9)]
    with torch.no_grad():
        expected = [float(model(frame.image_BCHW)[0, 0]) * 255 for frame in clip(9)]
    assert [a.value.top[0][1] for a in logs[0]] == pytest.approx(expected, abs=2e-3)


def test_a_predictive_net_is_judged_by_the_newest_frame_of_its_tick():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), Bright()).eval()
    circuit = ss.parallel(ss.cut(model, torch.zeros(1, 3, 4, 4), num_stages=3))
    given: dict[str, Any] = {"answer": level, "clip": "c", "prepare": images}
    answered = run_offline(circuit, clip(9), **given)
    newest = run_offline(circuit, clip(9), judged_frame="newest", **given)
    assert [a.frame_index for a in answered] == list(range(9))
    assert [a.frame_index for a in newest] == list(range(2, 9))  # two ticks later; the last two come after the end
    assert [a.ready_seconds for a in newest] == [n / RATE for n in range(2, 9)]
    assert [a.value for a in newest] == [a.value for a in answered[:7]]
    works = one_device(9, repeat(1.29))  # frames 0 1 2 3 5 6 7
    simulated = run_simulated(circuit, clip(9), works, frame_rate=RATE, judged_frame="newest", **given)
    assert [a.frame_index for a in simulated] == [w.frame_index for w in works[2:]]
    assert [a.ready_seconds for a in simulated] == [w.start / RATE for w in works[2:]]  # made before; held until then
    assert all(before.ready <= after.start for before, after in zip(works, works[2:], strict=False))
    live = run_live(circuit, clip(9), judged_frame="newest", clock=ManualClock(), executor="inline", **given)
    assert [(a.frame_index, a.pts_seconds, a.value) for a in live] == [
        (a.frame_index, a.pts_seconds, a.value) for a in newest
    ]


def test_in_real_time_answers_are_ready_when_they_are_made():
    def slow(frame: Frame) -> Tensor:
        time.sleep(0.05)
        return frame.image_BCHW

    circuit = circuit_of(Bright())
    log = run_live(circuit, clip(20), answer=level, clip="c", prepare=slow)
    frames = [a.frame_index for a in log]
    assert frames == sorted(set(frames))
    assert 1 < len(frames) < 20  # 50 ms for a frame of 40 ms: some are dropped
    for a in log:
        assert a.arrived_seconds == pytest.approx(a.frame_index / RATE, abs=1e-6)
        assert a.ready_seconds >= a.arrived_seconds + 0.05
        assert a.value.top[0][1] == pytest.approx(a.frame_index, abs=1e-2)
    for before, after in pairwise(log):
        assert after.ready_seconds >= before.ready_seconds + 0.05


def test_the_log_of_a_model_without_memory_needs_no_run():
    works = one_device(10, repeat(2.5))
    circuit = circuit_of(Bright())
    offline = run_offline(circuit, clip(10), answer=level, clip="c", prepare=images)
    made = scheduled_answers(works, [a.value for a in offline], frame_rate=RATE, clip="c")
    assert made == run_simulated(circuit, clip(10), works, frame_rate=RATE, answer=level, clip="c", prepare=images)


def test_a_recorded_profile_has_a_time_for_every_stage_and_frame():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), Bright()).eval()
    circuit = ss.pipelined(ss.cut(model, torch.zeros(1, 3, 4, 4), num_stages=2))
    profile = record_profile(circuit, clip(9), prepare=images)
    assert profile.num_stages == 2
    assert len(profile.rows_seconds) == 9 - 3 - 1  # in the tick behind the last frame the first stage rests
    assert all(0 < seconds < 5 for row in profile.rows_seconds for seconds in row)
    assert len(record_profile(circuit, clip(5), prepare=images).rows_seconds) == 1
    with pytest.raises(InputError, match="4 frames are too few for a profile of this circuit; give 5 or more"):
        record_profile(circuit, clip(4), prepare=images)


def test_wrong_runs_say_what_to_give():
    circuit = circuit_of(Bright())
    with pytest.raises(SourceError, match="a clip of no frames"):
        run_live(circuit, [], answer=level, clip="c")
    with pytest.raises(InputError, match="takes up frame 4 of 2 frames"):
        run_simulated(circuit, clip(2), one_device(5, repeat(1)), frame_rate=RATE, answer=level, clip="c")
