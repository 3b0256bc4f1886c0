"""The Kalman filter against a textbook one in NumPy, and the association by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sidestream.evals.streaming.kalman import Track, associate, extrapolate, observe, start
from sidestream.evals.streaming.values import Boxes


def boxes(*rows: tuple[float, ...], scores: list[float] | None = None, labels: list[int] | None = None) -> Boxes:
    """Corner boxes."""
    count = len(rows)
    return Boxes(
        torch.tensor(rows, dtype=torch.float32).reshape(count, 4),
        torch.tensor(scores or [0.9] * count, dtype=torch.float32),
        torch.tensor(labels or [0] * count, dtype=torch.int64),
    )


def textbook(measurements: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kalman's equations as written in any book, with explicit inverses."""
    x, p = np.concatenate([measurements[0], np.zeros(4)]), 100.0 * np.eye(8)
    h = np.hstack([np.eye(4), np.zeros((4, 4))])
    for z, dt in zip(measurements[1:], steps, strict=True):
        f = np.eye(8)
        for i in range(4):
            f[i, i + 4] = dt
        x, p = f @ x, f @ p @ f.T + dt**2 * np.eye(8)
        y, s = z - h @ x, h @ p @ h.T + 10.0 * np.eye(4)
        k = p @ h.T @ np.linalg.inv(s)
        x, p = x + k @ y, (np.eye(8) - k @ h) @ p
    return x, p


def test_a_track_is_the_textbook_filter():
    chance = np.random.default_rng(0)
    steps = np.array([1, 2, 1, 3, 1, 1])
    times = np.concatenate([[0], np.cumsum(steps)])
    lefts = np.array([50.0, 40.0, 60.0, 30.0]) + times[:, None] * np.array([3.0, -2.0, 0.5, 0.25])
    measured = lefts + chance.normal(0, 1, lefts.shape)
    tracks: list[Track] = []
    for number, (left, top, width, height) in enumerate(measured.astype(np.float32)):
        seen = boxes((left, top, left + width, top + height))
        tracks = observe(tracks, seen, 0 if number == 0 else int(steps[number - 1]))
        assert len(tracks) == 1
    mean, covariance = textbook(measured, steps)
    # boxes are float32 corners, so a measurement of some 100 px is off by up to 1e-5
    np.testing.assert_allclose(tracks[0].mean_8.numpy(), mean, atol=1e-4)
    np.testing.assert_allclose(tracks[0].covariance_88.numpy(), covariance, atol=1e-9)
    ahead = extrapolate(tracks, 2.5).boxes_N4_px[0].numpy()
    left, top, width, height = mean[:4] + 2.5 * mean[4:]
    np.testing.assert_allclose(ahead, [left, top, left + width, top + height], atol=1e-3)


def test_detections_take_tracks_by_score_class_and_overlap():
    tracks = [start(torch.tensor([left, 0.0, 10.0, 10.0]), label, 0.5) for left, label in ((0, 0), (6, 0), (50, 1))]
    seen = boxes(
        (2, 0, 12, 10),  # IoU 8/12 with track 0, 6/14 with track 1; second to choose: track 0 is gone
        (1, 0, 11, 10),  # 9/11 with track 0; first to choose
        (50, 0, 60, 10),  # on track 2, but of another class
        (55, 0, 65, 10),  # 5/15 = 0.33 with track 2
        (57, 0, 67, 10),  # 3/17: too little
        scores=[0.8, 0.9, 0.99, 0.7, 0.95],
        labels=[0, 0, 0, 1, 1],
    )
    assert associate(tracks, seen) == [1, 0, None, 2, None]
    found = observe(tracks, seen, 1.0)
    assert len(found) == 5
    assert [float(t.mean_8[4:].abs().sum()) > 0 for t in found] == [True, True, False, True, False]
    assert [t.score for t in found] == pytest.approx([0.8, 0.9, 0.99, 0.7, 0.95])


def test_tracks_that_are_not_seen_are_dropped_and_old_values_stay_valid():
    tracks = [start(torch.tensor([0.0, 0.0, 10.0, 10.0]), 0, 0.5)]
    before = tracks[0].mean_8.clone()
    assert observe(tracks, boxes(), 1.0) == []
    assert len(observe(tracks, boxes((1, 0, 11, 10)), 1.0)) == 1
    assert torch.equal(tracks[0].mean_8, before)


def test_fast_objects_are_matched_where_they_should_be_now():
    track = start(torch.tensor([0.0, 0.0, 10.0, 10.0]), 0, 0.5)
    moving = replace(track, mean_8=torch.tensor([0.0, 0, 10, 10, 12, 0, 0, 0], dtype=torch.float64))
    seen = boxes((12, 0, 22, 10))
    assert float(observe([moving], seen, 1.0)[0].mean_8[4]) == pytest.approx(12.0)
    assert float(observe([moving], seen, 1.0, moves_before_matching=False)[0].mean_8[4]) == 0.0  # taken for a new one


def test_forecasts_are_clipped_and_small_ones_left_out():
    tracks = [start(torch.tensor(ltwh), 0, 0.5) for ltwh in ([-5.0, 5.0, 15.0, 20.0], [30.0, 0.0, 30.0, 7.0])]
    found = extrapolate(tracks, 1.0, size_px=(20, 40))
    assert found.boxes_N4_px.tolist() == [[0.0, 5.0, 10.0, 20.0]]  # the other: 10 x 7 = 70 pixels
    assert extrapolate(tracks, 1.0).boxes_N4_px.tolist()[1] == [30.0, 0.0, 60.0, 7.0]
    assert extrapolate([], 1.0).boxes_N4_px.shape == (0, 4)
