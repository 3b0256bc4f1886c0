"""``letterbox``: a picture scaled into a frame of another size, its shape kept, black bars around it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Box:
    """Where the picture lies in the frame: its corner and its size, in pixels."""

    top: int
    left: int
    height: int
    width: int


def fitted_box(picture_size_px: tuple[int, int], frame_size_px: tuple[int, int]) -> Box:
    """The largest box of the picture's shape in the middle of the frame, rounded to whole pixels. Pure arithmetic.

    One side fills the frame; the other is rounded, one pixel at least, and an odd row or column left over goes to the
    bottom or right bar. Both sizes are (height, width).
    """
    (height, width), (frame_height, frame_width) = picture_size_px, frame_size_px
    if height * frame_width >= width * frame_height:  # taller than the frame: bars left and right
        across = max(1, (2 * width * frame_height + height) // (2 * height))
        return Box(0, (frame_width - across) // 2, frame_height, across)
    down = max(1, (2 * height * frame_width + width) // (2 * width))
    return Box((frame_height - down) // 2, 0, down, frame_width)


def letterbox(rgb_HWC: np.ndarray, size_px: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (height, width, 3) of ``size_px``: scaled (bilinear, anti-aliased), centred, on black.

    A picture that has the size already is returned as it is.
    """
    from PIL import Image

    if rgb_HWC.shape[:2] == tuple(size_px):
        return rgb_HWC
    box = fitted_box((rgb_HWC.shape[0], rgb_HWC.shape[1]), size_px)
    scaled = Image.fromarray(np.ascontiguousarray(rgb_HWC)).resize((box.width, box.height), Image.Resampling.BILINEAR)
    framed = np.zeros((*size_px, 3), np.uint8)
    framed[box.top : box.top + box.height, box.left : box.left + box.width] = np.asarray(scaled)
    return framed
