"""Orientation from a display matrix: all eight, against the definition applied pixel by pixel."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sidestream.video.pixels import orientation, turn

ONE = 65536
STRAIGHT = [(a, 0, 0, d) for a, d in itertools.product((1, -1), repeat=2)]
SWAPPED = [(0, b, c, 0) for b, c in itertools.product((1, -1), repeat=2)]


@pytest.mark.parametrize("abcd", STRAIGHT + SWAPPED)
def test_every_orientation_moves_each_pixel_as_the_matrix_says(abcd: tuple[int, int, int, int]) -> None:
    a, b, c, d = abcd
    picture = np.random.default_rng(0).integers(0, 255, (3, 5, 3), dtype=np.uint8)
    positions = {(a * x + c * y, b * x + d * y): picture[y, x] for y in range(3) for x in range(5)}
    left, top = (min(p[axis] for p in positions) for axis in (0, 1))
    turned = turn(picture, orientation(np.array([a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, 1 << 30])))
    assert turned.shape == ((3, 5, 3) if a else (5, 3, 3))
    for (x, y), pixel in positions.items():
        assert np.array_equal(turned[y - top, x - left], pixel)
