"""Shapes: their outlines against polygons tested edge by edge, and keypoints that lie on them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sidestream.video.shapes import INSIDE, KEYPOINTS_LOCAL, SHAPE_NAMES

ROOT = math.sqrt(0.5)


def star_corners() -> list[tuple[float, float]]:
    radii = [1.0 if k % 2 == 0 else 0.4 for k in range(10)]
    return [(r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k, r in enumerate(radii)]


POLYGONS = {
    "square": [(-ROOT, -ROOT), (ROOT, -ROOT), (ROOT, ROOT), (-ROOT, ROOT)],
    "triangle": [(0, -1), (math.sqrt(0.75), 0.5), (-math.sqrt(0.75), 0.5)],
    "star": star_corners(),
    "diamond": [(0, -1), (0.6, 0), (0, 1), (-0.6, 0)],
    "bar": [(-0.95, -0.3), (0.95, -0.3), (0.95, 0.3), (-0.95, 0.3)],
    "cross": [
        (-0.95, -0.3), (-0.3, -0.3), (-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3),
        (0.95, 0.3), (0.3, 0.3), (0.3, 0.95), (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3),
    ],
}  # fmt: skip


def grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    across = (np.arange(side) + 0.5) / side * 2.2 - 1.1
    return across[None, :] + 0 * across[:, None], across[:, None] + 0 * across[None, :]


@pytest.mark.parametrize("name", POLYGONS)
def test_outline_is_the_polygon(name: str) -> None:
    """PIL's polygon filler is the twin; it may differ by a pixel along the outline."""
    side = 400
    picture = Image.new("1", (side, side))
    ImageDraw.Draw(picture).polygon(
        [((x + 1.1) / 2.2 * side, (y + 1.1) / 2.2 * side) for x, y in POLYGONS[name]], fill=1
    )
    expected, got = np.asarray(picture), INSIDE[name](*grid(side))
    assert (expected != got).sum() < 0.02 * expected.sum()


def test_round_shapes_have_the_right_area() -> None:
    cell = (2.2 / 400) ** 2
    assert INSIDE["circle"](*grid(400)).sum() * cell == pytest.approx(math.pi, rel=0.01)
    assert INSIDE["ring"](*grid(400)).sum() * cell == pytest.approx(math.pi * 0.7, rel=0.01)


@pytest.mark.parametrize("name", SHAPE_NAMES)
def test_shapes_fit_the_unit_circle_and_keypoints_lie_on_the_outline(name: str) -> None:
    x, y = grid(400)
    assert (x**2 + y**2)[INSIDE[name](x, y)].max() <= 1.0 + 1e-9
    points = KEYPOINTS_LOCAL[name]
    assert points.shape == (5, 2)
    assert points[0].tolist() == [0.0, 0.0]
    inner, outer = points[1:] * 0.98, points[1:] * 1.02
    assert INSIDE[name](inner[:, 0], inner[:, 1]).all()
    assert not INSIDE[name](outer[:, 0], outer[:, 1]).any()
