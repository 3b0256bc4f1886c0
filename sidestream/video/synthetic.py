"""``SyntheticVideo``: moving shapes over a drifting texture, with exact truth and sound: the offline test bed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from sidestream.errors import InputError, SourceError
from sidestream.types import Clip, Frame, Sound, Truth
from sidestream.video.motion import MovingShape, random_shapes
from sidestream.video.shapes import INSIDE, SHAPE_NAMES
from sidestream.video.synthetic_sound import sound_of

DRIFT_PX_PER_SECOND = (12.0, 5.0)
MIN_SIDE_PX, MAX_SIDE_PX = 8, 4096


class SyntheticVideo:
    """A made-up video; every frame is a pure function of the seed and its index.

    Args:
        seed: chooses objects, motion and background.
        num_frames: its length; None never ends.
        size_px: (height, width).
        frame_rate: frames a second.
        num_objects: shapes in the picture; the later ones pass in front.
        speed: 1 crosses the shorter side in about 3 s.

    Raises:
        InputError: a size, rate or number that makes no sense.
    """

    def __init__(
        self,
        seed: int = 0,
        num_frames: int | None = None,
        size_px: tuple[int, int] = (240, 320),
        frame_rate: float = 25.0,
        num_objects: int = 3,
        speed: float = 1.0,
    ) -> None:
        _check(seed, num_frames, size_px, frame_rate, num_objects, speed)
        self.seed, self.num_frames, self.frame_rate = seed, num_frames, float(frame_rate)
        self.size_px = (int(size_px[0]), int(size_px[1]))
        self.shapes: tuple[MovingShape, ...] = random_shapes(seed, num_objects, self.size_px, speed)
        self._speed = speed
        self._background = _texture(seed, self.size_px)

    @classmethod
    def from_options(cls, options: Mapping[str, str], frame_rate: float | None = None) -> SyntheticVideo:
        """From text such as ``{"seed": "3", "seconds": "10", "size": "240x320", "fps": "25", "objects": "3"}``.

        Keys: seed, seconds or frames, size (height x width), fps, objects, speed.

        Raises:
            SourceError: a key that does not exist or a value that does not fit.
        """
        values = {key: _parse(key, text) for key, text in options.items()}
        fps = frame_rate or values.pop("fps", 25.0)
        values.pop("fps", None)
        seconds, frames = values.pop("seconds", None), values.pop("frames", None)
        if frames is None and seconds is not None:
            frames = max(1, round(seconds * fps))
        names = {"size": "size_px", "objects": "num_objects"}
        try:
            return cls(num_frames=frames, frame_rate=fps, **{names.get(key, key): v for key, v in values.items()})
        except InputError as error:
            raise SourceError(f"synthetic source: {error}") from error

    @property
    def duration_seconds(self) -> float | None:
        return None if self.num_frames is None else self.num_frames / self.frame_rate

    def __iter__(self) -> Iterator[Frame]:
        index = 0
        while self.num_frames is None or index < self.num_frames:
            yield self.frame(index)
            index += 1

    def frame(self, index: int) -> Frame:
        """The frame with that index and its truth (float keypoints; pixel i covers [i, i + 1))."""
        if index < 0 or (self.num_frames is not None and index >= self.num_frames):
            raise InputError(f"frame {index} does not exist; the video has {self.num_frames} frames, numbered from 0")
        seconds = index / self.frame_rate
        rgb_HWC = self._drifted(seconds)
        masks_NHW = np.zeros((len(self.shapes), *self.size_px), dtype=bool)
        for number, shape in enumerate(self.shapes):
            self._paint(shape, seconds, rgb_HWC, masks_NHW[: number + 1])
        return Frame(torch.from_numpy(rgb_HWC), index, seconds, truth=self._truth(seconds, masks_NHW))

    def clip(self, start: int = 0, num_frames: int | None = None, *, with_sound: bool = False) -> Clip:
        """``num_frames`` frames from ``start`` on (all of them by default), as a Clip."""
        if num_frames is None:
            num_frames = (self.num_frames or 0) - start
        frames = [self.frame(start + offset) for offset in range(num_frames)]
        if not frames:
            raise InputError("an endless synthetic video has no clip of all its frames; give num_frames, 1 or more")
        span = (start / self.frame_rate, (start + num_frames) / self.frame_rate)
        sound = self.sound(*span) if with_sound else None
        return Clip(torch.stack([f.rgb_HWC for f in frames]), tuple(f.pts_seconds for f in frames), sound)

    def sound(self, start_seconds: float, end_seconds: float, sample_rate_hz: int = 16000) -> Sound:
        """Stereo sound of that stretch: a tone per class, panned to where the object is, a click per bounce."""
        if not (0 <= start_seconds < end_seconds and sample_rate_hz > 0):
            raise InputError(f"sound from {start_seconds} to {end_seconds} s at {sample_rate_hz} Hz makes no sense")
        return sound_of(self.shapes, self.size_px, (start_seconds, end_seconds), sample_rate_hz)

    def _drifted(self, seconds: float) -> np.ndarray:
        """The background at that time: a window that moves over a texture which repeats."""
        height, width = self.size_px
        left = int(DRIFT_PX_PER_SECOND[0] * self._speed * seconds) % width
        top = int(DRIFT_PX_PER_SECOND[1] * self._speed * seconds) % height
        return self._background[top : top + height, left : left + width].copy()

    def _paint(self, shape: MovingShape, seconds: float, rgb_HWC: np.ndarray, masks_NHW: np.ndarray) -> None:
        """Draw one shape over what is there; ``masks_NHW`` holds the masks of the shapes below, and its own, last."""
        height, width = self.size_px
        x, y = (float(value) for value in shape.centre_px(seconds, self.size_px))
        left, right = max(0, int(x - shape.radius_px - 1)), min(width, int(x + shape.radius_px + 2))
        top, bottom = max(0, int(y - shape.radius_px - 1)), min(height, int(y + shape.radius_px + 2))
        inside = _inside(shape, seconds, np.arange(left, right) + 0.5 - x, np.arange(top, bottom) + 0.5 - y)
        window = (slice(top, bottom), slice(left, right))
        rgb_HWC[window][inside] = np.asarray(shape.rgb).astype(np.uint8)
        masks_NHW[:-1, top:bottom, left:right] &= ~inside
        masks_NHW[-1][window] = inside

    def _truth(self, seconds: float, masks_NHW: np.ndarray) -> Truth:
        points = [shape.keypoints_px(seconds, self.size_px) for shape in self.shapes]
        points_NP2 = np.stack(points) if points else np.zeros((0, 5, 2))
        return Truth(
            labels_N=torch.tensor([shape.label for shape in self.shapes], dtype=torch.int64),
            boxes_N4_px=torch.from_numpy(boxes_of(masks_NHW)),
            masks_NHW=torch.from_numpy(masks_NHW),
            keypoints_NP2_px=torch.from_numpy(points_NP2.astype(np.float32)),
        )


def boxes_of(masks_NHW: np.ndarray) -> np.ndarray:
    """Tight boxes of masks, float32 (N, 4): x_min, y_min, x_max, y_max (exclusive); zeros where a mask is empty."""
    boxes = np.zeros((len(masks_NHW), 4), dtype=np.float32)
    for box, mask_HW in zip(boxes, masks_NHW, strict=True):
        xs, ys = np.flatnonzero(mask_HW.any(0)), np.flatnonzero(mask_HW.any(1))
        if xs.size:
            box[:] = xs[0], ys[0], xs[-1] + 1, ys[-1] + 1
    return boxes


def _inside(shape: MovingShape, seconds: float, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Which pixels (rows dy, columns dx away from the centre) belong to the shape, bool."""
    angle = shape.angle + shape.turn * seconds
    cos, sin = math.cos(angle) / shape.radius_px, math.sin(angle) / shape.radius_px
    dx, dy = dx.astype(np.float32)[None, :], dy.astype(np.float32)[:, None]
    return INSIDE[SHAPE_NAMES[shape.label]](cos * dx + sin * dy, cos * dy - sin * dx)


def _texture(seed: int, size_px: tuple[int, int]) -> np.ndarray:
    """Dull smooth noise that repeats without a seam, tiled 2 x 2: uint8 (2H, 2W, 3)."""
    rng = np.random.default_rng((seed, 2))
    height, width = size_px
    shorter = min(height, width)
    down, across = np.fft.fftfreq(height)[:, None] * shorter, np.fft.fftfreq(width)[None, :] * shorter
    weight = 1.0 / (3.0 + np.sqrt(down**2 + across**2)) ** 2
    noise = np.fft.fft2(rng.standard_normal((3, height, width))) * weight
    smooth = np.fft.ifft2(noise).real
    smooth /= smooth.std(axis=(1, 2), keepdims=True)
    tile = np.clip(110 + 22 * smooth.mean(0, keepdims=True) + 14 * smooth, 0, 255).astype(np.uint8)
    return np.tile(np.ascontiguousarray(tile.transpose(1, 2, 0)), (2, 2, 1))


def _parse(key: str, text: str) -> Any:
    """One option of the synthetic source from its text."""
    kinds: dict[str, Any] = {
        "seed": int, "frames": int, "objects": int, "seconds": float, "fps": float, "speed": float, "size": _size
    }  # fmt: skip
    if key not in kinds:
        raise SourceError(f"the synthetic source has no option {key!r}; it knows {', '.join(sorted(kinds))}")
    try:
        return kinds[key](text)
    except ValueError as error:
        raise SourceError(
            f"synthetic source: {key}={text!r} does not fit; write for example seed=3, size=240x320"
        ) from error


def _size(text: str) -> tuple[int, int]:
    height, width = text.lower().split("x")
    return int(height), int(width)


def _check(
    seed: int, num_frames: int | None, size_px: tuple[int, int], frame_rate: float, num_objects: int, speed: float
) -> None:
    if seed < 0:
        raise InputError(f"seed is {seed}; give 0 or more")
    if num_frames is not None and num_frames < 1:
        raise InputError(f"num_frames is {num_frames}; give 1 or more, or None for a video without end")
    if not all(MIN_SIDE_PX <= side <= MAX_SIDE_PX for side in size_px):
        raise InputError(f"size_px is {tuple(size_px)}; give (height, width), each {MIN_SIDE_PX} to {MAX_SIDE_PX}")
    if not 0 < frame_rate <= 10_000:
        raise InputError(f"frame_rate is {frame_rate}; give frames per second, above 0")
    if not 0 <= num_objects <= 100 or not math.isfinite(speed):
        raise InputError(f"num_objects is {num_objects} and speed {speed}; give 0 to 100 objects and a finite speed")
