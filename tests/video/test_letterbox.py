"""Letterbox: the box in closed form, the pixels against torch's own resize, and a written file pixel by pixel."""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from video.plain_decode import plain_decode

from sidestream.video import VideoWriter, stream, write
from sidestream.video.letterbox import Box, fitted_box, letterbox


@pytest.mark.parametrize(
    ("picture", "frame", "box"),
    [
        ((48, 64), (96, 128), Box(0, 0, 96, 128)),
        ((100, 200), (200, 200), Box(50, 0, 100, 200)),
        ((200, 100), (200, 200), Box(0, 50, 200, 100)),
        ((10, 10), (48, 64), Box(0, 8, 48, 48)),
        ((7, 10), (10, 11), Box(1, 0, 8, 11)),
        ((3, 5), (10, 10), Box(2, 0, 6, 10)),
        ((1, 1000), (48, 64), Box(23, 0, 1, 64)),
        ((1000, 1), (48, 64), Box(0, 31, 48, 1)),
        ((720, 1280), (480, 640), Box(60, 0, 360, 640)),
    ],
)
def test_the_box(picture: tuple[int, int], frame: tuple[int, int], box: Box) -> None:
    assert fitted_box(picture, frame) == box


def test_the_box_is_the_largest_of_its_shape_in_the_middle() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        height, width, frame_height, frame_width = (rng.randint(1, 300) for _ in range(4))
        box = fitted_box((height, width), (frame_height, frame_width))
        scale = min(Fraction(frame_height, height), Fraction(frame_width, width))
        assert box.height == frame_height or box.width == frame_width
        assert box.height <= frame_height
        assert box.width <= frame_width
        assert abs(box.height - scale * height) <= Fraction(1, 2) or box.height == 1
        assert abs(box.width - scale * width) <= Fraction(1, 2) or box.width == 1
        assert 0 <= frame_height - box.height - 2 * box.top <= 1
        assert 0 <= frame_width - box.width - 2 * box.left <= 1


def torch_letterbox(rgb_HWC: np.ndarray, size_px: tuple[int, int], box: Box) -> np.ndarray:
    """The same, with torch's anti-aliased bilinear resize and its padding."""
    pixels_1CHW = torch.from_numpy(rgb_HWC).permute(2, 0, 1)[None].float()
    scaled = F.interpolate(pixels_1CHW, (box.height, box.width), mode="bilinear", antialias=True, align_corners=False)
    right, bottom = size_px[1] - box.left - box.width, size_px[0] - box.top - box.height
    return F.pad(scaled, (box.left, right, box.top, bottom))[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("picture", "frame"),
    [((48, 64), (96, 128)), ((90, 40), (48, 64)), ((31, 97), (48, 64)), ((5, 5), (49, 65)), ((300, 20), (33, 64))],
)
def test_pixels_are_torchs(picture: tuple[int, int], frame: tuple[int, int]) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (*picture, 3), dtype=np.uint8)
    before = rgb.copy()
    got, box = letterbox(rgb, frame), fitted_box(picture, frame)
    assert got.shape == (*frame, 3)
    assert got.dtype == np.uint8
    assert np.abs(got - torch_letterbox(rgb, frame, box)).max() <= 1.0  # Pillow rounds after each of two passes
    bars = np.ones(frame, bool)
    bars[box.top : box.top + box.height, box.left : box.left + box.width] = False
    assert not got[bars].any()
    assert np.array_equal(rgb, before)


def test_a_picture_of_that_size_stays_itself() -> None:
    rgb = np.zeros((6, 4, 3), np.uint8)
    assert letterbox(rgb, (6, 4)) is rgb


def flat(size: tuple[int, int], level: int) -> np.ndarray:
    return np.full((*size, 3), level, np.uint8)


def test_the_writer_fits_frames_of_other_sizes(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", frame_rate=25, crf=0, fit=True) as writer:
        for size, level in [((48, 64), 200), ((96, 64), 150), ((24, 64), 100), ((96, 128), 50), ((48, 64), 250)]:
            writer.add(flat(size, level))
    rgb, _ = plain_decode(tmp_path / "a.mp4")
    wanted = np.zeros((5, 48, 64, 3))
    wanted[0], wanted[3], wanted[4] = 200, 50, 250
    wanted[1, :, 16:48] = 150
    wanted[2, 12:36] = 100
    assert rgb.shape == wanted.shape
    assert np.abs(rgb - wanted).max() <= 3  # 8-bit YUV in limited range; grey, so that chroma blurs no edge


def test_the_writer_fits_the_first_frame_too_where_the_size_is_given(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", frame_rate=25, size_px=(49, 65), crf=0, fit=True) as writer:
        writer.add(flat((49, 13), 180))
    rgb, _ = plain_decode(tmp_path / "a.mp4")
    wanted = np.zeros((1, 50, 66, 3))
    wanted[:, :, 26:39] = 180  # the last row is repeated to make the height even
    assert rgb.shape == wanted.shape
    assert np.abs(rgb - wanted).max() <= 3


def test_a_folder_of_images_of_several_sizes_becomes_a_video(tmp_path: Path) -> None:
    for number, (width, height) in enumerate([(64, 48), (32, 48), (640, 480)]):
        Image.new("RGB", (width, height), (90, 90, 90)).save(tmp_path / f"{number}.png")
    rgb, _ = plain_decode(write(tmp_path / "a.mkv", stream(tmp_path), crf=0, fit=True))
    wanted = np.full((3, 48, 64, 3), 90.0)
    wanted[1, :, :16] = wanted[1, :, 48:] = 0
    assert np.abs(rgb - wanted).max() <= 3
