"""The rules of ``Timeline`` and of the choice between presentation and decoding times, on lists worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestream.video.decode import StampChoice
from sidestream.video.timeline import Timeline


def placed(raw: list[float | None], period: float = 0.04) -> list[float]:
    timeline = Timeline(period)
    return [timeline.place(each) for each in raw]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ([5.0, 5.04, 5.9, 5.91], [0.0, 0.04, 0.9, 0.91]),  # kept exactly, from zero
        ([None, None, None], [0.0, 0.04, 0.08]),  # no stamps at all
        ([1.0, None, None, 1.2], [0.0, 0.04, 0.08, 0.2]),  # a hole
        ([0.0, 0.04, 0.04, 0.08], [0.0, 0.04, 0.0404, 0.08]),  # one time twice
        ([10.0, 10.04, 2.0, 2.04], [0.0, 0.04, 0.08, 0.12]),  # begins anew
        ([0.0, math.nan, math.inf], [0.0, 0.04, 0.08]),
        ([None, -0.03, 0.01, 0.06], [0.0, 0.04, 0.08, 0.13]),  # the first stamp comes late, and before its time
        ([None, None, 700.0, 700.1], [0.0, 0.04, 0.08, 0.18]),  # ... far off
        ([None, 0.1, 0.3], [0.0, 0.1, 0.3]),  # ... and fits
    ],
)
def test_rules(raw: list[float | None], expected: list[float]) -> None:
    assert placed(raw) == pytest.approx(expected, abs=1e-12)


def test_restart_leaves_the_gap_that_it_was_told() -> None:
    timeline = Timeline(0.04)
    times = [timeline.place(0.0), timeline.place(0.04)]
    timeline.restart(gap_seconds=2.0)
    times += [timeline.place(7.0), timeline.place(7.04)]
    assert times == pytest.approx([0.0, 0.04, 2.08, 2.12])


def test_restart_without_a_stamp() -> None:
    timeline = Timeline(0.04)
    times = [timeline.place(5.0), timeline.place(5.04)]
    timeline.restart()
    times += [timeline.place(raw) for raw in (None, -0.03, 0.01)]
    assert times == pytest.approx([0.0, 0.04, 0.08, 0.12, 0.16])


@given(st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=60), st.floats(1e-3, 1.0))
def test_always_strictly_increasing_from_zero(raw: list[float | None], period: float) -> None:
    times = placed(raw, period)
    assert times[0] == 0.0
    assert all(later > earlier for earlier, later in itertools.pairwise(times))


def test_stamp_choice_keeps_good_presentation_times() -> None:
    choice = StampChoice("matroska,webm")
    assert [choice.choose(pts, dts) for pts, dts in [(0, 0), (3, None), (4, 1), (9, 2)]] == [
        (0, False), (3, False), (4, False), (9, False)
    ]  # fmt: skip


def test_stamp_choice_leaves_presentation_times_that_fall_back() -> None:
    choice = StampChoice("mpeg")
    assert [choice.choose(*each)[0] for each in [(1, 1), (4, 2), (3, 3), (6, 4), (5, 5)]] == [1, 4, 3, 4, 5]
    assert StampChoice("avi").choose(2, 1) == (1, True)
    assert StampChoice("avi").choose(2, None) == (2, False)
    assert StampChoice("avi").choose(None, None) == (None, False)
