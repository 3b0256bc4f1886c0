"""The simulator: the published policy table to the last digit, pipelines in closed form, drawn runtimes."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestream.errors import InputError
from sidestream.evals.streaming.pairing import count, latest_ready
from sidestream.evals.streaming.runtimes import RuntimeProfile
from sidestream.evals.streaming.schedule import POLICIES, Work, one_device, pipeline, unlimited_devices

POLICY_NAMES = ("idle-free", "idle-next", "shrinking-tail", "half-tail", "half-next-tail")
TABLE = {
    Fraction(1, 2): ((12, 119), (12, 119), (12, 119), (12, 119), (12, 119)),
    Fraction(6, 5): ((25, 274), (27, 295), (24, 259), (24, 265), (27, 295)),
    Fraction(3, 2): ((29, 314), (27, 295), (27, 295), (27, 295), (27, 295)),
    Fraction(9, 5): ((34, 379), (27, 295), (27, 295), (27, 295), (32, 353)),
    Fraction(7, 3): ((38, 467), (39, 468), (38, 444), (38, 444), (38, 444)),
    Fraction(5, 2): ((42, 490), (39, 468), (39, 468), (39, 468), (39, 468)),
}
"""Runtime in frames -> for each policy the cumulative mismatch over 13 and over 120 frames, as the simulator of
"Towards Streaming Perception" (appendix B.1) counts it: an answer that is
ready exactly at a frame counts from the next."""


def cumulative_mismatch(works: list[Work], num_frames: int) -> int:
    numbers = latest_ready([w.ready for w in works], range(num_frames), ties_are_ready=False)
    return count(range(num_frames), [None if n is None else works[n].frame_index for n in numbers]).mismatch


def test_every_policy_is_in_the_table():
    assert tuple(POLICIES) == POLICY_NAMES


@pytest.mark.parametrize("runtime", TABLE, ids=str)
@pytest.mark.parametrize("number", range(5), ids=POLICY_NAMES.__getitem__)
def test_the_published_table_of_policies(runtime: Fraction, number: int) -> None:
    found = tuple(
        cumulative_mismatch(
            one_device(num_frames, repeat(runtime), policy=POLICY_NAMES[number], expected=runtime), num_frames
        )
        for num_frames in (13, 120)
    )
    assert found == TABLE[runtime][number]


@pytest.mark.parametrize("runtime", TABLE, ids=str)
@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_floats_make_the_same_schedule_as_fractions(runtime: Fraction, policy: str) -> None:
    exact = one_device(60, repeat(runtime), policy=policy, expected=runtime)
    rounded = one_device(60, repeat(float(runtime)), policy=policy, expected=float(runtime))
    assert [w.frame_index for w in rounded] == [w.frame_index for w in exact]
    assert [w.ready for w in rounded] == pytest.approx([float(w.ready) for w in exact], abs=1e-9)


runtime_lists = st.lists(st.fractions(min_value=Fraction(1, 8), max_value=4, max_denominator=16), min_size=1)


@given(runtime_lists, st.sampled_from(POLICY_NAMES), st.integers(1, 40))
def test_a_device_does_one_thing_at_a_time_and_never_a_frame_twice_or_early(runtimes, policy, num_frames):
    def endless():
        while True:
            yield from runtimes

    works = one_device(num_frames, endless(), policy=policy, expected=runtimes[0])
    assert works[0] == Work(0, 0, runtimes[0])
    for work in works:
        assert work.frame_index <= work.start < work.frame_index + 1  # the newest frame, and not before it came
        assert work.frame_index < num_frames
    for before, after in pairwise(works):
        assert before.ready <= after.start
        assert before.frame_index < after.frame_index
        if policy == "idle-free":
            assert after.start == max(before.ready, before.frame_index + 1)


def test_unlimited_devices_answer_every_frame_in_the_order_of_the_answers():
    works = unlimited_devices(3, iter([Fraction(5, 2), 1, 0]))
    assert works == [Work(1, 1, 2), Work(2, 2, 2), Work(0, 0, Fraction(5, 2))]


def test_a_pipeline_has_the_throughput_of_its_slowest_stage_and_the_latency_of_all():
    row = (Fraction(1, 2), Fraction(3, 2), Fraction(1, 4))
    works = pipeline(60, repeat(row))
    starts = [w.start for w in works]
    assert all(b - a == Fraction(3, 2) for a, b in pairwise(starts))
    assert all(w.ready - w.start == sum(row) for w in works)
    alone = one_device(60, repeat(sum(row)))
    assert (len(works), len(alone)) == (40, 27)


def test_a_pipeline_faster_than_the_camera_answers_every_frame():
    works = pipeline(10, repeat((0.5, 0.25)))
    assert works == [Work(n, n, n + 0.75) for n in range(10)]


def test_stages_wait_for_their_input_and_for_themselves():
    rows = [(1, 3), (1, 1), (2, 1)]
    assert pipeline(7, iter([*rows, (9, 9)])) == [
        Work(0, 0, 4),
        Work(3, 3, 5),  # taken up after the slowest stage's 3; stage 1 until 4, stage 2 until 5
        Work(4, 4, 7),
        Work(6, 6, 24),
    ]


def test_lockstep_ticks_wait_for_frames_and_for_the_slowest_stage():
    slow = pipeline(4, repeat((Fraction(1, 2), Fraction(3, 2), 1)), lockstep=True)
    assert [(w.frame_index, w.ready) for w in slow] == [(0, Fraction(9, 2)), (1, 6), (3, Fraction(15, 2))]
    fast = pipeline(4, repeat((0.25, 0.5)), lockstep=True)
    assert [w.ready for w in fast] == [1.5, 2.5, 3.5, 4.0]  # the next tick begins with the next frame; the last is free
    assert [w.ready for w in pipeline(4, repeat((0.25, 0.5)), lockstep=True, num_ticks=1)] == [0.5, 1.5, 2.5, 3.5]


def test_wrong_schedules_say_what_to_give():
    with pytest.raises(InputError, match="unknown scheduling policy 'lazy'; expected one of idle-free"):
        one_device(3, repeat(1), policy="lazy")
    with pytest.raises(InputError, match="'shrinking-tail' looks ahead; give expected"):
        one_device(3, repeat(1), policy="shrinking-tail")
    with pytest.raises(InputError, match="runtimes ended after 1"):
        one_device(3, [1])
    with pytest.raises(InputError, match="a runtime of -1 frames"):
        unlimited_devices(3, repeat(-1))
    with pytest.raises(InputError, match="give 0 or more"):
        pipeline(3, repeat((1, -1)))


def test_a_profile_draws_the_same_runtimes_for_the_same_seed(tmp_path):
    profile = RuntimeProfile(((0.01, 0.03), (0.02, 0.02), (0.05, 0.01)))
    draws = [profile.draw_rows(10.0, seed=seed) for seed in (4, 4, 5)]
    rows = [[next(draw) for _ in range(60)] for draw in draws]
    assert rows[0] == rows[1] != rows[2]
    assert set(rows[0]) == {tuple(s * 10.0 for s in row) for row in profile.rows_seconds}
    assert [sum(row) for row in rows[0]] == [next(d) for d in [profile.draw(10.0, seed=4)] for _ in range(60)]
    assert profile.mean_seconds == pytest.approx(0.14 / 3)
    assert profile.scaled(2.0).mean_seconds == pytest.approx(0.28 / 3)
    profile.write(tmp_path / "p.json", machine="a test")
    assert RuntimeProfile.read(tmp_path / "p.json") == profile


def test_wrong_profiles_are_refused(tmp_path):
    with pytest.raises(InputError, match="all of one length"):
        RuntimeProfile(((0.1,), (0.1, 0.2)))
    with pytest.raises(InputError, match="give seconds"):
        RuntimeProfile(((-0.1,),))
    (tmp_path / "p.json").write_text("{}")
    with pytest.raises(InputError, match="is no runtime profile: KeyError"):
        RuntimeProfile.read(tmp_path / "p.json")
