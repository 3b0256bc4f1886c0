"""The shapes of the synthetic video: their pixels and their keypoints, as pure functions of local coordinates.

Local coordinates: the shape's centre is (0, 0), it fits into the circle of radius 1, x to the right, y down.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Inside = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x * x + y * y <= 1.0


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) <= math.sqrt(0.5)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (y <= 0.5) & (math.sqrt(3.0) * np.abs(x) <= y + 1.0)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points at radius 1, five notches at radius 0.4: fold the angle into half a point, test one edge."""
    sector = math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
    radius = np.sqrt(x * x + y * y)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    notch_along, notch_across = 0.4 * math.cos(sector), 0.4 * math.sin(sector)
    return along * notch_across + across * (1.0 - notch_along) <= notch_across


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return (long <= 0.95) & (short <= 0.3)


def _diamond(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(x) / 0.6 + np.abs(y) <= 1.0


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    radius_squared = x * x + y * y
    return (radius_squared <= 1.0) & (radius_squared >= 0.3)


def _bar(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.abs(x) <= 0.95) & (np.abs(y) <= 0.3)


INSIDE: dict[str, Inside] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "diamond": _diamond,
    "ring": _ring,
    "bar": _bar,
}

SHAPE_NAMES: tuple[str, ...] = tuple(INSIDE)
"""Class names of the synthetic video; the class of an object is an index into them."""

_ROOT = math.sqrt(0.5)
_STAR_LOW = (math.sin(math.pi / 5), math.cos(math.pi / 5))
_EXTREMES: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": ((0, -1), (1, 0), (0, 1), (-1, 0)),
    "square": ((-_ROOT, -_ROOT), (_ROOT, -_ROOT), (_ROOT, _ROOT), (-_ROOT, _ROOT)),
    "triangle": ((0, -1), (math.sqrt(0.75), 0.5), (0, 0.5), (-math.sqrt(0.75), 0.5)),
    "star": ((0, -1), _STAR_LOW, (0, 0.4), (-_STAR_LOW[0], _STAR_LOW[1])),
    "cross": ((0, -0.95), (0.95, 0), (0, 0.95), (-0.95, 0)),
    "diamond": ((0, -1), (0.6, 0), (0, 1), (-0.6, 0)),
    "ring": ((0, -1), (1, 0), (0, 1), (-1, 0)),
    "bar": ((0, -0.3), (0.95, 0), (0, 0.3), (-0.95, 0)),
}

KEYPOINTS_LOCAL: dict[str, np.ndarray] = {
    name: np.array(((0.0, 0.0), *extremes), dtype=np.float64) for name, extremes in _EXTREMES.items()
}
"""Five keypoints of each shape, (5, 2): the centre, then four points of the outline that turn with the shape."""
