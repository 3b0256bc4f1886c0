"""The motion of the synthetic video: straight lines that bounce off the borders, in closed form.

Nothing is carried from frame to frame, so that any moment can be worked out without the ones before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sidestream.video.shapes import KEYPOINTS_LOCAL, SHAPE_NAMES


def bounce(free: np.ndarray | float, low: float, high: float) -> np.ndarray:
    """Fold a straight line into [low, high]: a triangle wave. ``free`` is where it would be without walls."""
    span = max(high - low, 1e-9)
    phase = np.mod(np.asarray(free, dtype=np.float64) - low, 2 * span)
    return low + np.where(phase > span, 2 * span - phase, phase)


def bounce_times(start: float, velocity: float, low: float, high: float, window: tuple[float, float]) -> np.ndarray:
    """The moments in ``window`` (seconds, half open) at which ``bounce(start + velocity * t)`` meets a wall."""
    span = high - low
    if abs(velocity) < 1e-9 or span <= 0:
        return np.empty(0)
    walls = sorted((start - low + velocity * t) / span for t in window)
    numbers = np.arange(math.floor(walls[0]) - 1, math.ceil(walls[1]) + 2)
    times = (numbers * span + low - start) / velocity
    return np.sort(times[(times >= window[0]) & (times < window[1])])


@dataclass(frozen=True, slots=True)
class MovingShape:
    """One object: what it is, and where it is at any time."""

    label: int
    radius_px: float
    start_px: tuple[float, float]
    """x, y of the centre at time 0."""
    velocity_px: tuple[float, float]
    """Pixels a second, x and y."""
    angle: float
    turn: float
    """Radians at time 0, and radians a second."""
    rgb: tuple[float, float, float]

    def centre_px(self, seconds: np.ndarray | float, size_px: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """x and y of the centre; the outline never leaves a frame of (height, width)."""
        x, y = (
            bounce(start + velocity * np.asarray(seconds), *self.walls_px(length))
            for start, velocity, length in zip(self.start_px, self.velocity_px, reversed(size_px), strict=True)
        )
        return x, y

    def walls_px(self, length_px: int) -> tuple[float, float]:
        """Between which coordinates the centre moves, along an axis of that many pixels."""
        return self.radius_px, length_px - self.radius_px

    def keypoints_px(self, seconds: float, size_px: tuple[int, int]) -> np.ndarray:
        """The five keypoints, (5, 2) as x, y."""
        x, y = self.centre_px(seconds, size_px)
        angle = self.angle + self.turn * seconds
        cos, sin = math.cos(angle), math.sin(angle)
        local = KEYPOINTS_LOCAL[SHAPE_NAMES[self.label]] * self.radius_px
        return local @ np.array([[cos, sin], [-sin, cos]]) + np.array([float(x), float(y)])

    def bounces(self, window: tuple[float, float], size_px: tuple[int, int]) -> np.ndarray:
        """The moments in ``window`` at which it hits a border, sorted."""
        axes = zip(self.start_px, self.velocity_px, reversed(size_px), strict=True)
        times = [bounce_times(start, speed, *self.walls_px(length), window) for start, speed, length in axes]
        return np.sort(np.concatenate(times))


def random_shapes(seed: int, num_objects: int, size_px: tuple[int, int], speed: float) -> tuple[MovingShape, ...]:
    """Objects drawn by the seed: the first ones all differ in class. They cross the frame in about 3 s at speed 1."""
    rng = np.random.default_rng((seed, 1))
    height, width = size_px
    shorter = min(height, width)
    order = rng.permutation(len(SHAPE_NAMES))
    shapes = []
    for number in range(num_objects):
        radius = shorter * rng.uniform(0.10, 0.18)
        heading = rng.uniform(0, 2 * math.pi)
        velocity = speed * shorter * rng.uniform(0.25, 0.45)
        shapes.append(
            MovingShape(
                label=int(order[number % len(order)]),
                radius_px=radius,
                start_px=(rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)),
                velocity_px=(velocity * math.cos(heading), velocity * math.sin(heading)),
                angle=rng.uniform(0, 2 * math.pi),
                turn=speed * rng.uniform(-1.0, 1.0),
                rgb=_vivid(rng.uniform()),
            )
        )
    return tuple(shapes)


def _vivid(hue: float) -> tuple[float, float, float]:
    import colorsys

    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, 0.95)
    return 255 * red, 255 * green, 255 * blue
