"""Keypoints: soft-argmax in closed form, PCK against a count by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sidestream.errors import InputError, LayoutError
from sidestream.evals.metrics import pck, points_from_maps


def test_soft_argmax_in_closed_form():
    """Two cells with all of the weight, at odds 3 : 1; the rest at minus infinity."""
    maps = torch.full((2, 1, 4, 6), float("-inf"), dtype=torch.float64)
    maps[0, 0, 1, 2], maps[0, 0, 3, 4] = math.log(3.0), 0.0
    maps[1, 0, 0, 0] = 7.0
    points, scores = points_from_maps(maps, 4.0)
    assert points.shape == (2, 1, 2)
    assert points[0, 0].tolist() == pytest.approx([4 * (0.75 * 2.5 + 0.25 * 4.5), 4 * (0.75 * 1.5 + 0.25 * 3.5)])
    assert points[1, 0].tolist() == [2.0, 2.0]
    assert scores[:, 0].tolist() == pytest.approx([0.75, 1.0])


def test_a_gaussian_on_the_logits_gives_its_middle_between_the_cells():
    ys, xs = torch.meshgrid(torch.arange(20) + 0.5, torch.arange(30) + 0.5, indexing="ij")
    maps = -((xs - 14.3) ** 2 + (ys - 9.8) ** 2) / (2 * 1.5**2)  # its softmax is a Gaussian of 1.5 cells
    points, _ = points_from_maps(maps[None, None].double(), 8.0)
    assert points[0, 0].tolist() == pytest.approx([8 * 14.3, 8 * 9.8], abs=1e-3)
    sharp, _ = points_from_maps(maps[None, None].double(), 8.0, sharpness=1e4)
    assert sharp[0, 0].tolist() == pytest.approx([8 * 14.5, 8 * 9.5])  # the largest cell


def test_a_flat_map_gives_the_middle_and_a_window_looks_at_the_peak_only():
    maps = torch.zeros(1, 1, 8, 10)
    maps[0, 0, 2, 7] = 1.0
    whole, score = points_from_maps(torch.zeros(1, 1, 8, 10), 4.0)
    assert whole[0, 0].tolist() == pytest.approx([20.0, 16.0])
    assert float(score) == pytest.approx(1 / 80)
    near, score = points_from_maps(maps, 4.0, window=1)
    assert near[0, 0].tolist() == pytest.approx([30.0, 10.0], abs=1e-5)
    assert float(score) == pytest.approx(math.e / (math.e + 8), abs=1e-6)
    maps[0, 0, 2, 7], maps[0, 0, 0, 9] = 0.0, 1.0  # in a corner 4 cells take part, one of them the peak
    corner, _ = points_from_maps(maps, 4.0, window=1)
    share = math.e / (math.e + 3)
    x = 9.5 * (share + (1 - share) / 3) + 8.5 * (1 - share) * 2 / 3
    assert corner[0, 0, 0] == pytest.approx(4 * x, abs=1e-4)


def test_soft_argmax_has_a_gradient():
    maps = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: points_from_maps(m, 4.0)[0], (maps,))


NAN = float("nan")
TRUTH = torch.tensor([
    [[0.0, 0.0], [10.0, 0.0], [0.0, 40.0], [10.0, 40.0]],  # box 10 x 40: size 40
    [[100.0, 50.0], [120.0, 50.0], [100.0, 60.0], [120.0, 60.0]],  # box 20 x 10: size 20
])  # fmt: skip
ANSWERS = torch.tensor([
    [[0.0, 4.0], [10.0, 4.1], [0.0, 31.0], [10.0, 49.0]],  # off by 4.0, 4.1, 9, 9
    [[102.0, 50.0], [120.0, 54.5], [NAN, NAN], [123.0, 56.0]],  # off by 2, 4.5, no answer, 5
])  # fmt: skip


def test_pck_is_the_count_by_hand():
    tight = pck(ANSWERS, TRUTH, alpha=0.1)  # at most 4 and 2 pixels
    assert (tight.num_right, tight.num_points) == (2, 8)
    assert tight.per_joint == ((2, 2), (0, 2), (0, 2), (0, 2))
    loose = pck(ANSWERS, TRUTH, alpha=0.225)  # at most 9 and 4.5 pixels
    assert loose.per_joint == ((2, 2), (2, 2), (1, 2), (1, 2))
    assert loose.share == 6 / 8
    assert loose.joint_shares == (1.0, 1.0, 0.5, 0.5)


def test_points_without_a_label_count_nowhere_and_do_not_stretch_the_box():
    labelled = torch.tensor([[True, True, False, False], [True, True, False, True]])
    found = pck(ANSWERS, TRUTH, alpha=0.41, labelled_NP=labelled)  # sizes 10 and 20: at most 4.1 and 8.2 pixels
    assert found.per_joint == ((2, 2), (2, 2), (0, 0), (1, 1))
    assert found.joint_shares == (1.0, 1.0, None, 1.0)
    assert found.share == 1.0


def test_the_torso_may_be_the_size():
    found = pck(ANSWERS, TRUTH, alpha=0.41, torso=(0, 1))  # sizes 10 and 20
    assert found.per_joint == ((2, 2), (2, 2), (0, 2), (1, 2))


def test_wrong_points_say_what_to_give():
    with pytest.raises(LayoutError, match=r"expected \(N, P, 2\) of both"):
        pck(ANSWERS[0], TRUTH[0])
    with pytest.raises(InputError, match="alpha = 0; give a share"):
        pck(ANSWERS, TRUTH, alpha=0)
    with pytest.raises(InputError, match=r"torso = \(0, 4\); expected two joints of 0 to 3"):
        pck(ANSWERS, TRUTH, torso=(0, 4))
    with pytest.raises(LayoutError, match=r"expected float \(B, P, H, W\)"):
        points_from_maps(torch.zeros(1, 2, 3, 4, dtype=torch.int64), 4.0)
