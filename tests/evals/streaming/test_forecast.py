"""Forecasts on things that move evenly are exact, use nothing from the future, and leave classes alone."""

from __future__ import annotations

import pytest
import torch

from sidestream.evals.streaming import (
    Answer,
    Boxes,
    Classes,
    ClassLabel,
    FrameTruth,
    Points,
    pair,
    score,
    with_forecast,
)

RATE, DELAY = 20.0, 3


def points_at(frame: float) -> Points:
    """A person of 4 joints that moves 5 px a frame to the right and grows taller."""
    rest = torch.tensor([[10.0, 10.0], [20.0, 10.0], [10.0, 40.0], [20.0, 40.0]])
    speed = torch.tensor([[5.0, 0.0], [5.0, 0.0], [5.0, 1.0], [5.0, 1.0]])
    return Points(rest + frame * speed, torch.ones(4))


def box_at(frame: float) -> Boxes:
    left = 10.0 + 2.0 * frame
    return Boxes(torch.tensor([[left, 20.0, left + 30.0, 60.0]]), torch.tensor([0.9]), torch.tensor([0]))


def late_log(value_at: object, num_frames: int, every: int = 1) -> list[Answer]:
    """Every frame, or every other one, answered ``DELAY`` frames later."""
    return [
        Answer("a", n, n / RATE, n / RATE, (n + DELAY) / RATE, value_at(n))  # type: ignore[operator]
        for n in range(0, num_frames, every)
    ]


def test_points_at_constant_velocity_are_right_from_the_second_answer_on():
    truths = [FrameTruth("a", n, n / RATE, points_at(n)) for n in range(30)]
    answers = late_log(points_at, 30, every=2)
    pairs = pair(truths, answers)
    moved = with_forecast(pairs, answers)
    for before, after in zip(pairs, moved, strict=True):
        assert after.truth is before.truth
        frame = before.truth.frame_index
        if frame < DELAY:
            assert after.answer is None
        elif frame < DELAY + 2:  # one answer: nothing is known of its motion
            assert torch.equal(after.answer.value.points_P2_px, points_at(0).points_P2_px)
        else:
            torch.testing.assert_close(after.answer.value.points_P2_px, points_at(frame).points_P2_px)
    stale, ahead = score(pairs), score(moved)
    assert stale["pck@0.1"] < 0.1
    assert ahead["pck@0.1"] >= (30 - DELAY - 2) / 30
    assert (stale["miss"], stale["mismatch"]) == (ahead["miss"], ahead["mismatch"])


def test_boxes_come_nearer_to_the_truth_and_reach_it():
    truths = [FrameTruth("a", n, n / RATE, box_at(n)) for n in range(60)]
    answers = late_log(box_at, 60)
    moved = with_forecast(pair(truths, answers), answers)
    last = moved[-1].answer.value.boxes_N4_px
    # the filter's velocity settles at the true one: with a delay of 3 frames a stale box would be off by 6 px
    torch.testing.assert_close(last, box_at(59).boxes_N4_px, atol=0.05, rtol=0)


def test_what_was_not_ready_does_not_count():
    truths = [FrameTruth("a", n, n / RATE, points_at(n)) for n in range(12)]
    answers = late_log(points_at, 12)
    early = with_forecast(pair(truths, answers), answers)
    tampered = [
        a
        if a.ready_seconds <= 8 / RATE + 1e-6
        else Answer("a", a.frame_index, a.pts_seconds, 0.0, a.ready_seconds, points_at(99))
        for a in answers
    ]
    late = with_forecast(pair(truths, tampered), tampered)
    for one, other in zip(early[:9], late[:9], strict=True):
        assert (one.answer is None) == (other.answer is None)
        if one.answer is not None:
            assert torch.equal(one.answer.value.points_P2_px, other.answer.value.points_P2_px)
    assert not torch.equal(early[9].answer.value.points_P2_px, late[9].answer.value.points_P2_px)


def test_an_answer_to_an_older_frame_changes_nothing():
    truths = [FrameTruth("a", n, n / RATE, points_at(n)) for n in range(6)]
    answers = [Answer("a", f, f / RATE, 0.0, ready / RATE, points_at(f)) for f, ready in ((0, 1), (2, 3), (1, 4))]
    moved = with_forecast(pair(truths, answers), answers)
    torch.testing.assert_close(moved[5].answer.value.points_P2_px, points_at(5).points_P2_px)


def test_classes_stay_as_they_are():
    truths = [FrameTruth("a", n, n / RATE, ClassLabel(1)) for n in range(5)]
    answers = late_log(lambda n: Classes(((n % 2, 1.0),)), 5)
    pairs = pair(truths, answers)
    assert with_forecast(pairs, answers) == pairs
    assert score(pairs)["top_1"] == pytest.approx(1 / 5)
