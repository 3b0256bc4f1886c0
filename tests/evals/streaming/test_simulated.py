"""Simulated devices: schedules of circuits against loops written out here; what they cannot tell is refused."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sidestream as ss
from sidestream.circuit.ages import latency_ticks, look_ahead_ticks, mixes_ages
from sidestream.circuit.net_stages import net_circuit
from sidestream.circuit.wire import Circuit
from sidestream.circuit.wiring import pipelined, wire, with_periods
from sidestream.errors import InputError
from sidestream.evals.streaming import Answer, Classes, FrameTruth, RuntimeProfile, at_rate, counts_of, pair
from sidestream.evals.streaming.live import run_simulated
from sidestream.evals.streaming.schedule import Work
from sidestream.evals.streaming.simulated import SimulatedDevice, constant_profile, grouped, parallel_groups
from sidestream.models.parallel_densenet import ParDenseNet
from sidestream.nn.combine import Chain, PerFrame
from sidestream.nn.conv3d import Conv3d
from sidestream.types import Frame, Output

RATE, NUM_FRAMES = 25.0, 24
Row = Sequence[Fraction]


class Mean(nn.Module):
    def forward(self, frame_BCHW: Tensor) -> Tensor:
        return frame_BCHW.mean((2, 3))


def chain(wiring: str, num_stages: int = 4) -> Circuit:
    model = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(num_stages - 1)), Mean()).eval()
    stages = ss.cut(model, torch.zeros(1, 3, 8, 8), cut=[str(n) for n in range(1, num_stages)], costs="uniform")
    assert len(stages) == num_stages
    return wire(stages, wiring)


def dense(wiring: str, *, feedback: bool = False) -> Circuit:
    """Six blocks, of which the later ones read all before: with fresh skips they see frames of different ages."""
    torch.manual_seed(0)
    net = ParDenseNet(3, stages=(6,), growth=2, stem=4, bottleneck=2, num_layers=1)
    if feedback:
        net.add_feedback()
    circuit = net_circuit(net.eval(), torch.rand(1, 3, 8, 8), wiring)
    assert circuit.num_stages == 6
    return circuit


def frames() -> list[Frame]:
    return at_rate((Frame(torch.full((8, 8, 3), n, dtype=torch.uint8), n, 0.0) for n in range(NUM_FRAMES)), RATE)


def first_class(output: Output) -> Classes:
    return Classes(((int(output.value.argmax()), 1.0),))


def slow_ticks(durations: Sequence[Fraction]) -> tuple[list[int], list[Fraction], list[Fraction]]:
    """Frame, beginning and end of ticks, of which the next takes up the newest frame when the one before is over."""
    chosen: list[int] = []
    starts: list[Fraction] = []
    ends: list[Fraction] = []
    now = Fraction(0)
    while now < NUM_FRAMES:
        come = [n for n in range(NUM_FRAMES) if n <= now and n not in chosen]
        if not come or (chosen and max(come) < chosen[-1]):
            later = [n for n in range(NUM_FRAMES) if n > now]
            if not later:
                break
            now = Fraction(later[0])
            come = later[:1]
        chosen.append(max(come))
        starts.append(now)
        now += durations[len(starts) - 1]
        ends.append(now)
    return chosen, starts, ends


def slow_counts(answers: list[tuple[int, Fraction]]) -> tuple[int, int, int]:
    """In time, miss and mismatch: at every frame's arrival the last of ``(frame, ready)`` that was ready."""
    in_time = miss = mismatch = 0
    for n in range(NUM_FRAMES):
        ready = [(when, frame) for frame, when in answers if when <= n]
        if not ready:
            miss += 1
            continue
        used = max(ready)[1]
        in_time += used == n
        mismatch += n - used
    return in_time, miss, mismatch


def counted(answers: Sequence[Answer]) -> tuple[int, int, int]:
    truths = [FrameTruth("c", n, n / RATE, Classes(((0, 1.0),))) for n in range(NUM_FRAMES)]
    found = counts_of(pair(truths, answers))
    return found.in_time, found.miss, found.mismatch


def simulated(circuit: Circuit, profile: RuntimeProfile, judged_frame: Any, **options: Any) -> list[Answer]:
    device = SimulatedDevice(profile, RATE, **options)
    works = device.schedule(circuit, NUM_FRAMES, 0)
    given: dict[str, Any] = {"frame_rate": RATE, "answer": first_class, "clip": "c", "judged_frame": judged_frame}
    found = run_simulated(circuit, frames(), works, prepare=lambda frame: frame.image_BCHW, **given)
    for a in found:
        assert a.ready_seconds >= a.arrived_seconds - 1e-12
        assert a.arrived_seconds == a.pts_seconds == a.frame_index / RATE
    return found


def assert_answers(found: Sequence[Answer], expected: list[tuple[int, Fraction]]) -> None:
    assert [a.frame_index for a in found] == [frame for frame, _ in expected]
    assert [a.ready_seconds * RATE for a in found] == pytest.approx([float(ready) for _, ready in expected], abs=1e-9)
    assert counted(found) == slow_counts(expected)


def profile_of(*rows: Row) -> RuntimeProfile:
    return RuntimeProfile(tuple(tuple(float(part) / RATE for part in row) for row in rows))


def drawn(profile: RuntimeProfile) -> list[list[Fraction]]:
    """The first rows that a device draws, in frames, as fractions."""
    rows = islice(profile.draw_rows(RATE), NUM_FRAMES)
    return [[Fraction(part).limit_denominator(1000) for part in row] for row in rows]


FAST = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 8), Fraction(1, 16))
SLOW = (Fraction(1, 2), Fraction(11, 8), Fraction(3, 4), Fraction(1, 4))


@pytest.mark.parametrize("rows", [[FAST], [SLOW], [FAST, SLOW]], ids=["fast", "slow", "both"])
@pytest.mark.parametrize("wiring", ["pipelined", "parallel", "semi-parallel:2"])
@pytest.mark.parametrize("judged_frame", ["answered", "newest"])
def test_a_chain_of_stages_is_a_pipeline_of_its_groups(rows: list[Row], wiring: str, judged_frame: str) -> None:
    circuit, profile = chain(wiring), profile_of(*rows)
    groups = [[0, 1], [2, 3]] if wiring == "semi-parallel:2" else [[0], [1], [2], [3]]
    assert parallel_groups(circuit) == [[n + 1 for n in group] for group in groups]
    sums = [[sum((row[n] for n in group), Fraction(0)) for group in groups] for row in drawn(profile)]
    chosen, starts, _ = slow_ticks([max(row) for row in sums])
    made: list[Fraction] = []
    done = [Fraction(0)] * len(groups)
    for start, row in zip(starts, sums, strict=False):
        time = start
        for n, runtime in enumerate(row):
            done[n] = time = max(time, done[n]) + runtime
        made.append(time)
    later = latency_ticks(circuit)
    assert later == len(groups) - 1
    expected = list(zip(chosen, made, strict=True))
    if judged_frame == "newest":  # the sink is done with tick n + later; the tick's own frame must be there
        expected = [(chosen[n], max(made[n - later], starts[n])) for n in range(later, len(chosen))]
    assert_answers(simulated(circuit, profile, judged_frame), expected)


@pytest.mark.parametrize("rows", [[FAST + FAST[:2]], [FAST + SLOW[:2], SLOW + FAST[:2]]], ids=["fast", "both"])
@pytest.mark.parametrize("judged_frame", ["answered", "newest"])
def test_groups_that_see_mixed_ages_tick_in_lockstep_as_long_as_the_slowest_group(rows: Any, judged_frame: str) -> None:
    circuit, profile = dense("semi-parallel:3:fresh"), profile_of(*rows)
    assert mixes_ages(circuit)
    assert parallel_groups(circuit) == [[1, 2], [3, 4], [5, 6]]
    durations = [max(row[0] + row[1], row[2] + row[3], row[4] + row[5]) for row in drawn(profile)]
    chosen, _, ends = slow_ticks(durations)
    later = latency_ticks(circuit)
    assert later == 2
    if judged_frame == "newest":
        expected = [(chosen[n], ends[n]) for n in range(later, len(chosen))]
    else:
        last = durations[len(chosen) - 1]
        ends += [ends[-1] + last, ends[-1] + 2 * last]
        expected = [(frame, ends[n + later]) for n, frame in enumerate(chosen)]
    assert_answers(simulated(circuit, profile, judged_frame), expected)


@pytest.mark.parametrize("runtime", [Fraction(1, 2), Fraction(13, 10)])
@pytest.mark.parametrize("judged_frame", ["answered", "newest"])
def test_one_device_ends_the_tick_that_an_answer_needs(runtime: Fraction, judged_frame: str) -> None:
    circuit, profile = dense("parallel"), profile_of([runtime])
    chosen, _, ends = slow_ticks([runtime] * NUM_FRAMES)
    later = latency_ticks(circuit)
    assert mixes_ages(circuit)
    assert later == 5
    if judged_frame == "newest":
        expected = [(chosen[n], ends[n]) for n in range(later, len(chosen))]
    else:
        ends += [ends[-1] + n * runtime for n in range(1, later + 1)]
        expected = [(frame, ends[n + later]) for n, frame in enumerate(chosen)]
    assert_answers(simulated(circuit, profile, judged_frame), expected)


@pytest.mark.parametrize("num_columns", [1, 2])
def test_layers_that_look_ahead_wait_for_the_frames_that_they_need(num_columns: int) -> None:
    net = Chain(Conv3d(3, 3, (3, 1, 1), padding=(1, 0, 0)), PerFrame(Mean())).eval()
    circuit = pipelined(ss.cut(net, torch.zeros(1, 3, 8, 8), cut=["1"]))
    assert (look_ahead_ticks(circuit), latency_ticks(circuit)) == (1, 1)
    runtime = Fraction(5, 4)
    profile = profile_of([runtime / num_columns] * num_columns)
    chosen, _, ends = slow_ticks([runtime / num_columns] * NUM_FRAMES)
    made = [end + (runtime - runtime / num_columns) for end in ends] + [ends[-1] + runtime * (3 - num_columns)]
    found = simulated(circuit, profile, "answered")
    assert_answers(found[:-1], [(frame, made[n + 1]) for n, frame in enumerate(chosen[:-1])])
    assert found[-1].ready_seconds > found[-2].ready_seconds


def test_what_cannot_be_told_is_refused() -> None:
    def schedule(circuit: Circuit, profile: RuntimeProfile, **options: Any) -> list[Work]:
        return SimulatedDevice(profile, RATE, **options).schedule(circuit, 9, 0)

    with pytest.raises(InputError, match="runtimes of 3 stages for a circuit of 4"):
        schedule(chain("pipelined"), constant_profile((1, 2, 3)))
    slow_clock = with_periods(chain("pipelined"), (1, 1, 2, 2))
    with pytest.raises(InputError, match=r"do not work in every tick .* give one runtime for the whole net"):
        schedule(slow_clock, constant_profile((1, 2, 3, 4)))
    fed_back = dense("semi-parallel:2", feedback=True)
    varied = RuntimeProfile(((0.1,) * 6, (0.2,) * 6))
    with pytest.raises(InputError, match="waits for its own answers, which is simulated only for stages that always"):
        schedule(fed_back, varied)
    assert schedule(fed_back, constant_profile([10] * 6))
    with pytest.raises(InputError, match="a device for every frame: it feeds answers back; choose another policy"):
        schedule(fed_back, constant_profile([10]), policy="unlimited")
    with pytest.raises(InputError, match="mixes frames of different ages"):
        schedule(dense("parallel"), constant_profile([10]), policy="unlimited")
    assert len(schedule(chain("pipelined"), constant_profile([10]), policy="unlimited")) == 9


def test_rows_of_groups_are_sums() -> None:
    assert list(grouped([(1, 2, 4), (8, 16, 32)], [[1, 3], [2]])) == [(5, 2), (40, 16)]
