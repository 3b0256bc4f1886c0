"""Scores of every kind of truth, on the synthetic source: perfect answers, late ones, forecasts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sidestream.errors import InputError
from sidestream.evals.metrics import Detections, box_ap, pck
from sidestream.evals.streaming import (
    Answer,
    Boxes,
    Classes,
    ClassLabel,
    FrameTruth,
    Points,
    main_figure,
    pair,
    score,
    with_forecast,
)
from sidestream.video import SyntheticVideo

RATE, NUM_FRAMES, SIZE_PX = 25.0, 40, (120, 160)


def boxes_of(frame: Any) -> Boxes:
    truth = frame.truth
    return Boxes(truth.boxes_N4_px, torch.ones(len(truth.labels_N)), truth.labels_N)


def log_of(values: list[Any], delay_frames: float) -> tuple[list[FrameTruth], list[Answer]]:
    """Perfect answers, so many frames late."""
    truths = [FrameTruth("a", n, n / RATE, value) for n, value in enumerate(values)]
    return truths, [Answer("a", n, n / RATE, n / RATE, (n + delay_frames) / RATE, v) for n, v in enumerate(values)]


@pytest.fixture(scope="module")
def boxes() -> list[Boxes]:
    video = SyntheticVideo(seed=4, num_frames=NUM_FRAMES, size_px=SIZE_PX, num_objects=2, speed=1.5)
    return [boxes_of(frame) for frame in video]


def test_boxes_judged_live_lose_and_a_forecast_wins_some_back(boxes: list[Boxes]) -> None:
    pytest.importorskip("pycocotools")
    truths, answers = log_of(boxes, 0)
    assert main_figure(score(pair(truths, answers))) == ("AP", pytest.approx(1.0))
    truths, late = log_of(boxes, 4)
    pairs = pair(truths, late)
    found = score(pairs)
    empty = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    given = [Detections(b.boxes_N4_px, b.scores_N, b.labels_N) for b in boxes]
    expected = box_ap([empty] * 4 + given[:-4], given)
    assert {name: found[name] for name in expected} == expected
    moved = score(with_forecast(pairs, late, size_px=SIZE_PX))
    assert found["AP"] + 0.1 < moved["AP"] < 1.0
    assert (found["miss"], found["mismatch"]) == (4, 4 * (NUM_FRAMES - 4))


def test_points_are_scored_as_pck_with_misses_as_wrong_points() -> None:
    torch.manual_seed(0)
    values = [Points(torch.rand(6, 2) * 100, (torch.rand(6) > 0.3).float()) for _ in range(10)]
    truths, answers = log_of(values, 1)
    found = score(pair(truths, answers))
    stacked = torch.stack([v.points_P2_px for v in values])
    labelled_NP = torch.stack([v.scores_P > 0 for v in values])
    given = torch.cat([torch.full((1, 6, 2), torch.nan), stacked[:-1]])
    for alpha in (0.1, 0.2):
        expected = pck(given, stacked, alpha=alpha, labelled_NP=labelled_NP)
        assert found[f"pck@{alpha}"] == expected.share
        assert found[f"pck@{alpha}_per_joint"] == list(expected.joint_shares)
    assert main_figure(found)[0] == "pck@0.2"


def test_kinds_that_do_not_fit_are_named() -> None:
    truths, _ = log_of([ClassLabel(0)] * 2, 0)
    _, answers = log_of([Points(torch.zeros(1, 2), torch.ones(1))] * 2, 0)
    with pytest.raises(InputError, match=r"frame 0 of 'a': the truth is a ClassLabel, the answer Points; .* Classes"):
        score(pair(truths, answers))
    mixed = [truths[0], FrameTruth("a", 1, 1.0, Points(torch.zeros(1, 2), torch.ones(1)))]
    with pytest.raises(InputError, match="truth of the kinds ClassLabel, Points; expected one kind"):
        score(pair(mixed, []))
    with pytest.raises(InputError, match="expected one number of joints"):
        truths, _ = log_of([Points(torch.zeros(2, 2), torch.ones(2))] * 2, 0)
        score(pair(truths, answers))


def test_an_answer_without_a_class_is_wrong() -> None:
    truths, _ = log_of([ClassLabel(0)] * 2, 0)
    _, answers = log_of([Classes(()), Classes(((0, 1.0),))], 0)
    assert score(pair(truths, answers))["top_1"] == 0.5
