"""``overlay``: what is drawn is where it should be, what is not drawn is untouched, and the input stays as it is."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from sidestream.data.joints import JHMDB_JOINTS
from sidestream.errors import LayoutError
from sidestream.types import Frame
from sidestream.video import SHAPE_NAMES, SyntheticVideo, overlay
from sidestream.video.overlay import COLOURS, JHMDB_SKELETON

SIZES = [(120, 160), (240, 320), (1080, 1920), (320, 180), (32, 40)]


def black(size: tuple[int, int]) -> Frame:
    return Frame(torch.full((*size, 3), 60, dtype=torch.uint8), 5, 0.2, 1.5)


def changed(frame: Frame, drawn: Frame) -> np.ndarray:
    return (frame.rgb_HWC != drawn.rgb_HWC).any(-1).numpy()


@pytest.mark.parametrize("size", SIZES)
def test_everything_at_once_at_every_size(size: tuple[int, int]) -> None:
    frame = SyntheticVideo(seed=3, size_px=size).frame(40)
    before, truth = frame.rgb_HWC.clone(), frame.truth
    drawn = overlay(
        frame,
        labels=["golden retriever 71.2 %", "a name that is much, much too long for any line of any picture " * 4, ""],
        boxes_N4_px=truth.boxes_N4_px,
        box_labels=[SHAPE_NAMES[label] for label in truth.labels_N],
        points_NP2_px=truth.keypoints_NP2_px,
        masks_NHW=truth.masks_NHW,
        timing={"fps": 31.25, "latency": "40 ms", "age": 3},
        banner="warming up",
    )
    assert torch.equal(frame.rgb_HWC, before)
    assert drawn.rgb_HWC.shape == before.shape
    assert drawn.rgb_HWC.dtype == torch.uint8
    assert (drawn.index, drawn.pts_seconds, drawn.truth) == (frame.index, frame.pts_seconds, truth)


def test_nothing_to_draw_changes_no_pixel() -> None:
    frame = black((64, 64))
    drawn = overlay(frame)
    assert torch.equal(drawn.rgb_HWC, frame.rgb_HWC)
    assert drawn.rgb_HWC.data_ptr() != frame.rgb_HWC.data_ptr()
    assert drawn.arrived_at_seconds == 1.5


def test_a_box_is_an_outline_of_its_own_pixels() -> None:
    frame = black((240, 320))
    touched = changed(frame, overlay(frame, boxes_N4_px=torch.tensor([[50.0, 60.0, 150.0, 160.0]])))
    ys, xs = np.nonzero(touched)
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (50, 60, 150, 160)
    assert not touched[70:150, 60:140].any()


def test_hidden_objects_have_no_box() -> None:
    frame = black((240, 320))
    boxes = torch.tensor([[0.0, 0.0, 0.0, 0.0], [10.0, 10.0, float("nan"), 20.0]])
    assert not changed(frame, overlay(frame, boxes_N4_px=boxes, box_labels=["a", "b"])).any()


def test_points_are_drawn_round_their_place() -> None:
    frame = black((240, 320))
    for points in (torch.tensor([[[100.0, 50.0]]]), np.array([[100.0, 50.0]])):
        ys, xs = np.nonzero(changed(frame, overlay(frame, points_NP2_px=points)))
        assert xs.mean() == pytest.approx(100, abs=1)
        assert ys.mean() == pytest.approx(50, abs=1)
        assert np.ptp(xs) < 12


def test_points_are_fainter_the_less_sure_they_are() -> None:
    frame = black((240, 320))
    points = torch.tensor([[40.0, 50.0], [120.0, 50.0], [200.0, 50.0], [float("nan"), 50.0]])
    drawn = overlay(frame, points_NP2_px=points, scores_NP=torch.tensor([0.4, 0.2, 0.0, 0.4])).rgb_HWC
    for x, share in ((40, 1.0), (120, 0.3 + 0.7 * 0.5), (200, 0.3)):
        expected = 60 * (1 - share) + np.array(COLOURS[0]) * share
        assert np.abs(drawn[50, x].numpy() - expected).max() <= 2
    assert not changed(frame, overlay(frame, points_NP2_px=points[3:])).any()
    many = overlay(frame, points_NP2_px=torch.stack([points, points + 60]), scores_NP=torch.ones(2, 4)).rgb_HWC
    assert many[110, 100].tolist() == list(COLOURS[1])


def test_a_skeleton_joins_its_points_and_no_others() -> None:
    frame = black((240, 320))
    points = torch.tensor([[40.0, 40.0], [140.0, 40.0], [140.0, 140.0], [40.0, float("nan")]])
    limbs = ((0, 1), (2, 3))
    touched = changed(frame, overlay(frame, points_NP2_px=points, skeleton=limbs))
    assert touched[40, 40:140].all()
    assert not touched[60:120].any()  # neither 1 - 2, which is no limb, nor 2 - 3, which has no second end
    faint = overlay(frame, points_NP2_px=points, skeleton=limbs, scores_NP=torch.tensor([1.0, 0.5, 1, 1])).rgb_HWC
    assert np.abs(faint[40, 90].numpy() - (60 * 0.35 + np.array(COLOURS[0]) * 0.65)).max() <= 2


def test_the_skeleton_of_jhmdb_joins_the_joints_that_belong_together() -> None:
    named = {frozenset((JHMDB_JOINTS[a], JHMDB_JOINTS[b])) for a, b in JHMDB_SKELETON}
    chains = [("neck", "shoulder", "elbow", "wrist"), ("belly", "hip", "knee", "ankle")]
    expected = {frozenset(("neck", "face")), frozenset(("neck", "belly"))}
    for trunk, *limb in chains:
        for side in "rl":
            names = [trunk, *(f"{side}_{part}" for part in limb)]
            expected |= {frozenset(each) for each in pairwise(names)}
    assert named == expected
    assert len(JHMDB_SKELETON) == 14


def test_masks_tint_their_pixels_and_no_others() -> None:
    frame = black((240, 320))
    mask = torch.zeros(1, 240, 320, dtype=torch.bool)
    mask[0, 30:60, 40:90] = True
    drawn = overlay(frame, masks_NHW=mask)
    assert np.array_equal(changed(frame, drawn), mask[0].numpy())
    expected = 60 * 0.55 + np.array(COLOURS[0]) * 0.45
    assert np.abs(drawn.rgb_HWC[40, 50].numpy() - expected).max() <= 1


@pytest.mark.parametrize("size", SIZES[:3])
def test_panel_and_bar_keep_to_their_places_and_can_be_read(size: tuple[int, int]) -> None:
    """The panel is in the upper left, the bar at the bottom; their letters stand out from their ground."""
    frame = black(size)
    panel = changed(frame, overlay(frame, labels=["cat 90 %", "dog 5 %"]))
    ys, xs = np.nonzero(panel)
    assert ys.max() < size[0] / 2
    assert xs.max() < size[1] * 0.8
    drawn = overlay(frame, timing={"fps": 30.0, "latency": "12 ms"})
    bar = changed(frame, drawn)
    rows = np.flatnonzero(bar.any(1))
    assert rows.max() == size[0] - 1
    assert rows.min() > size[0] * 0.8
    light = drawn.rgb_HWC[rows.min() :].float().mean(-1)
    assert float(light.max()) - float(light.median()) > 150


def test_wrong_shapes_are_refused() -> None:
    frame = black((40, 50))
    with pytest.raises(LayoutError, match=r"boxes_N4_px has shape \(2, 3\); expected \(N, 4\)"):
        overlay(frame, boxes_N4_px=np.zeros((2, 3)))
    with pytest.raises(LayoutError, match=r"masks_NHW has shape \(1, 50, 40\); expected \(N, 40, 50\)"):
        overlay(frame, masks_NHW=np.zeros((1, 50, 40)))
    with pytest.raises(LayoutError, match="points_NP2_px"):
        overlay(frame, points_NP2_px=np.zeros((2, 3, 3)))
    with pytest.raises(LayoutError, match=r"scores_NP has shape \(1, 2\); expected \(2, 3\)"):
        overlay(frame, points_NP2_px=np.zeros((2, 3, 2)), scores_NP=np.zeros(2))
    with pytest.raises(LayoutError, match=r"the skeleton joins \(0, 3\), but there are 3 points"):
        overlay(frame, points_NP2_px=np.zeros((3, 2)), skeleton=[(0, 1), (0, 3)])
    with pytest.raises(LayoutError, match="2 box_labels for 1 boxes"):
        overlay(frame, boxes_N4_px=np.zeros((1, 4)), box_labels=["a", "b"])
