"""Which frames make a clip: against index arithmetic where frames are even, against brute force where they are not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestream.data.sampling import clip_indices, nearest, possible_starts, random_generator, spread_start


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 5), st.data())
def test_even_frames_are_the_same_by_count_and_by_time(
    num_frames: int, length: int, step: int, data: st.DataObject
) -> None:
    begins = data.draw(st.sampled_from([0.0, 3.21, -0.5]))  # files need not begin at 0
    pts = [begins + n * 0.04 for n in range(num_frames)]
    for rate in (None, 25.0):
        starts = possible_starts(pts, length, step, rate)
        assert starts == max(1, num_frames - (length - 1) * step) or (rate and step > 1)
        start = data.draw(st.integers(0, max(1, num_frames - (length - 1) * step) - 1))
        held = clip_indices(pts, start=start, num_frames=length, frame_step=step, frame_rate=rate)
        assert held == [min(start + n * step, num_frames - 1) for n in range(length)]
        if num_frames > 1:
            looped = clip_indices(pts, start=start, num_frames=length, frame_step=step, short="loop", frame_rate=rate)
            assert looped == [(start + n * step) % num_frames for n in range(length)]


@given(st.lists(st.floats(0.01, 0.3), min_size=1, max_size=30), st.integers(1, 8), st.floats(2.0, 60.0))
def test_by_time_each_frame_is_the_nearest(gaps: list[float], length: int, rate: float) -> None:
    pts = [sum(gaps[:n]) for n in range(len(gaps) + 1)]
    for n, index in enumerate(clip_indices(pts, start=0, num_frames=length, frame_rate=rate)):
        distances = [abs(t - n / rate) for t in pts]
        assert distances[index] == pytest.approx(min(distances), abs=1e-9)
    last = possible_starts(pts, length, 1, rate) - 1
    if last > 0:  # such a clip ends inside, or less than half a period outside
        assert pts[last] + (length - 1) / rate < pts[-1] + 0.5 / rate + 1e-9


def test_uneven_frames_are_counted_or_taken_by_time() -> None:
    pts = [n * 0.1 for n in range(10) if n != 4]
    by_count = [pts[i] for i in clip_indices(pts, start=0, num_frames=4, frame_step=2)]
    assert by_count == pytest.approx([0.0, 0.2, 0.5, 0.7])
    by_time = [pts[i] for i in clip_indices(pts, start=0, num_frames=5, frame_step=2, frame_rate=10.0)]
    assert by_time == pytest.approx([0.0, 0.2, 0.3, 0.6, 0.8])  # 0.4 is missing: of 0.3 and 0.5 the earlier


def test_one_frame_is_a_clip_too() -> None:
    assert clip_indices([0.0], start=0, num_frames=3, frame_step=2, short="loop") == [0, 0, 0]
    assert nearest([0.0, 1.0], 0.5) == 0
    assert nearest([0.0, 1.0], 9.0) == 1


def test_clips_are_spread_evenly_and_a_single_one_is_centred() -> None:
    assert [spread_start(9, n, 3) for n in range(3)] == [0, 4, 8]
    assert spread_start(9, 0, 1) == 4
    assert [spread_start(1, n, 4) for n in range(4)] == [0, 0, 0, 0]


def test_generators_depend_on_all_their_numbers_and_on_nothing_else() -> None:
    keys = [(s, e, i) for s in range(3) for e in range(3) for i in range(3)]
    drawn = [float(random_generator(*key).random()) for key in keys]
    assert len(set(drawn)) == 27
    assert drawn == [float(random_generator(*key).random()) for key in keys]
