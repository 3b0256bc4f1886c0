"""``overlay``: answers drawn on a frame: labels, boxes, points, masks, a banner and a bar of timings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidestream.errors import LayoutError
from sidestream.types import Frame

COLOURS: tuple[tuple[int, int, int], ...] = (
    (255, 170, 30), (60, 180, 255), (120, 220, 90), (255, 90, 120), (190, 130, 255), (40, 220, 200), (240, 230, 80),
    (255, 130, 220),
)  # fmt: skip
INK, SHADE, BANNER_SHADE = (255, 255, 255, 255), (12, 14, 18, 185), (200, 40, 40, 220)
MASK_STRENGTH = 0.45
FAINTEST = 0.3
"""How strongly a point is drawn that the answer is not at all sure of; the surest one is drawn in full."""
JHMDB_SKELETON: tuple[tuple[int, int], ...] = (
    (0, 1), (0, 2), (0, 3), (0, 4), (3, 7), (4, 8), (7, 11), (8, 12), (1, 5), (1, 6), (5, 9), (6, 10), (9, 13),
    (10, 14),
)  # fmt: skip
"""The limbs of a person with JHMDB's 15 joints, in the order of ``data.joints.JHMDB_JOINTS``."""
TOP_ACCENT = (255, 200, 70, 255)


def overlay(
    frame: Frame,
    *,
    labels: Sequence[str] | None = None,
    boxes_N4_px: Tensor | np.ndarray | None = None,
    box_labels: Sequence[str] | None = None,
    points_NP2_px: Tensor | np.ndarray | None = None,
    scores_NP: Tensor | np.ndarray | None = None,
    skeleton: Sequence[tuple[int, int]] = (),
    line_px: Sequence[int] | None = None,
    masks_NHW: Tensor | np.ndarray | None = None,
    timing: Mapping[str, str | float] | None = None,
    banner: str | None = None,
) -> Frame:
    """A new Frame with the same index and times and the answers drawn in; the given one stays as it is.

    Args:
        frame: what to draw on.
        labels: lines of the panel at the top left, best first.
        boxes_N4_px: x_min, y_min, x_max, y_max in pixels of the frame, with ``box_labels``, one each.
        points_NP2_px: P points for each of N objects as x, y (or (P, 2) for one); NaN where there is none.
        scores_NP: how sure each point is, 0 or more (or (P,) for one); the less against the surest, the fainter.
        skeleton: pairs of points that are joined by a line, such as ``JHMDB_SKELETON``.
        line_px: for each object the width of its lines and the radius of its points; default: fits the frame's size.
        masks_NHW: bool, one per object.
        timing: name -> value, written in the bar at the bottom; numbers with one decimal.
        banner: one line across the top, for what a viewer must not miss ("warming up").

    Raises:
        LayoutError: boxes, points, scores, line widths or masks of the wrong shape, or a skeleton of points that do not
            exist.
    """
    from PIL import Image, ImageDraw

    rgb_HWC = frame.rgb_HWC.cpu().numpy()
    if masks_NHW is not None:
        rgb_HWC = _with_masks(rgb_HWC, _array(masks_NHW, "masks_NHW", ("N", *rgb_HWC.shape[:2])))
    picture = Image.fromarray(rgb_HWC)
    pen = _Pen(ImageDraw.Draw(picture, "RGBA"), picture.size)
    if boxes_N4_px is not None:
        _draw_boxes(pen, _array(boxes_N4_px, "boxes_N4_px", ("N", 4)), box_labels)
    if points_NP2_px is not None:
        points = np.asarray(points_NP2_px)
        points = _array(points[None] if points.ndim == 2 else points, "points_NP2_px", ("N", "P", 2))
        widths = [pen.line_px + 1] * len(points) if line_px is None else line_px
        _draw_points(pen, points, _strengths(scores_NP, points.shape[:2]), skeleton, widths)
    top = _draw_banner(pen, banner) if banner else 0
    bottom = _draw_timing(pen, timing) if timing else 0
    if labels:
        _draw_panel(pen, labels, top, bottom)
    return dataclasses.replace(frame, rgb_HWC=torch.from_numpy(np.array(picture)))


@cache
def _font(size_px: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size_px)


class _Pen:
    """What all drawing needs: the canvas, its size, and a font and line width that suit it."""

    def __init__(self, draw: Any, size_WH: tuple[int, int]) -> None:
        self.draw = draw
        self.width, self.height = size_WH
        self.text_px = int(np.clip(round(min(self.width * 0.75, self.height) / 22), 10, 60))
        self.line_px = max(1, round(self.text_px / 8))
        self.pad_px = max(2, round(self.text_px * 0.35))
        self.font = _font(self.text_px)
        self.row_px = round(self.text_px * 1.3)

    def text_width(self, text: str) -> int:
        return int(np.ceil(self.draw.textlength(text, font=self.font)))

    def fitted(self, text: str, width_px: int) -> str:
        """The text on one line, cut with an ellipsis where it is too wide."""
        text = " ".join(str(text).split())
        if self.text_width(text) <= width_px:
            return text
        while text and self.text_width(text + "...") > width_px:
            text = text[:-1]
        return text.rstrip() + "..."

    def write(self, left: float, middle: float, text: str, ink: tuple[int, ...] = INK, anchor: str = "lm") -> None:
        self.draw.text((left, middle), text, fill=ink, font=self.font, anchor=anchor)


def _draw_panel(pen: _Pen, labels: Sequence[str], top: int, bottom: int) -> None:
    """Top-k lines on a shade, at the top left; as many as fit."""
    room_px = pen.height - top - bottom - 2 * pen.pad_px
    widest_px = min(pen.width - 4 * pen.pad_px, max(18 * pen.text_px, round(0.6 * pen.width)))
    lines = [pen.fitted(label, widest_px) for label in labels]
    lines = lines[: max(1, int((room_px - pen.pad_px) // pen.row_px))]
    widest = max(pen.text_width(line) for line in lines)
    left, upper = pen.pad_px, top + pen.pad_px
    right, lower = left + widest + 2 * pen.pad_px, upper + len(lines) * pen.row_px + pen.pad_px
    pen.draw.rounded_rectangle((left, upper, right, lower), radius=pen.pad_px, fill=SHADE)
    for row, line in enumerate(lines):
        middle = upper + pen.pad_px / 2 + (row + 0.5) * pen.row_px
        pen.write(left + pen.pad_px, middle, line, TOP_ACCENT if row == 0 else INK)


def _draw_banner(pen: _Pen, banner: str) -> int:
    """One line across the top; returns its height."""
    height = pen.row_px + pen.pad_px
    pen.draw.rectangle((0, 0, pen.width, height - 1), fill=BANNER_SHADE)
    pen.write(pen.width / 2, height / 2, pen.fitted(banner, pen.width - 2 * pen.pad_px), anchor="mm")
    return height


def _draw_timing(pen: _Pen, timing: Mapping[str, str | float]) -> int:
    """Names and values side by side along the bottom, over as many rows as they need; returns the height."""
    room_px = pen.width - 2 * pen.pad_px
    rows: list[str] = []
    for name, value in timing.items():
        part = f"{name} {value:.1f}" if isinstance(value, float) else f"{name} {value}"
        joined = f"{rows[-1]}  |  {part}" if rows else part
        if rows and pen.text_width(joined) <= room_px:
            rows[-1] = joined
        else:
            rows.append(part)
    rows = rows[: max(1, pen.height // (3 * pen.row_px))]
    height = len(rows) * pen.row_px + pen.pad_px
    pen.draw.rectangle((0, pen.height - height, pen.width, pen.height), fill=SHADE)
    for number, row in enumerate(rows):
        middle = pen.height - height + pen.pad_px / 2 + (number + 0.5) * pen.row_px
        pen.write(pen.pad_px, middle, pen.fitted(row, room_px))
    return height


def _draw_boxes(pen: _Pen, boxes_N4: np.ndarray, box_labels: Sequence[str] | None) -> None:
    if box_labels is not None and len(box_labels) != len(boxes_N4):
        raise LayoutError(f"{len(box_labels)} box_labels for {len(boxes_N4)} boxes; give one each")
    for number, box in enumerate(boxes_N4):
        left, top, right, bottom = (float(value) for value in box)
        if not np.isfinite(box).all() or right <= left or bottom <= top:
            continue  # hidden objects have empty boxes
        colour = COLOURS[number % len(COLOURS)]
        pen.draw.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=pen.line_px + 1)
        if box_labels is not None:
            _draw_tag(pen, left, top, box_labels[number], colour)


def _draw_tag(pen: _Pen, left: float, top: float, text: str, colour: tuple[int, int, int]) -> None:
    """The label of a box, on its upper edge where there is room, else inside it; never beyond the frame."""
    text = pen.fitted(text, pen.width - 2 * pen.pad_px)
    width = pen.text_width(text) + 2 * pen.pad_px
    left = min(max(left, 0), max(0, pen.width - width))
    upper = top - pen.row_px if top >= pen.row_px else max(top, 0)
    pen.draw.rectangle((left, upper, left + width, upper + pen.row_px - 1), fill=(*colour, 235))
    pen.write(left + pen.pad_px, upper + pen.row_px / 2, text, (15, 15, 15, 255))


def _draw_points(
    pen: _Pen,
    points_NP2: np.ndarray,
    strengths_NP: np.ndarray,
    skeleton: Sequence[tuple[int, int]],
    widths_px: Sequence[int],
) -> None:
    """The limbs of each object, as strong as the fainter of their ends, and its points over them."""
    num_points = points_NP2.shape[1]
    if len(widths_px) != len(points_NP2):
        raise LayoutError(f"{len(widths_px)} line_px for {len(points_NP2)} objects; give one each")
    if unknown := [limb for limb in skeleton if not all(0 <= end < num_points for end in limb)]:
        raise LayoutError(f"the skeleton joins {unknown[0]}, but there are {num_points} points; expected 0 and up")
    for number, (points, strengths, width) in enumerate(zip(points_NP2, strengths_NP, widths_px, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        is_there = np.isfinite(points).all(1)
        for a, b in skeleton:
            if is_there[a] and is_there[b]:
                ends = [(float(x), float(y)) for x, y in points[[a, b]]]
                alpha = round(255 * float(min(strengths[a], strengths[b])))
                pen.draw.line(ends, fill=(*colour, alpha), width=width)
        for (x, y), strength in zip(points[is_there], strengths[is_there], strict=True):
            box = (float(x) - width, float(y) - width, float(x) + width, float(y) + width)
            alpha = round(255 * float(strength))
            pen.draw.ellipse(box, fill=(*colour, alpha), outline=(15, 15, 15, alpha))


def _strengths(scores_NP: Any, shape_NP: tuple[int, int]) -> np.ndarray:
    """How strongly each point is drawn: ``FAINTEST`` to 1, in proportion to its score against its object's surest."""
    if scores_NP is None:
        return np.ones(shape_NP)
    scores = np.asarray(scores_NP, dtype=np.float64)
    scores = np.nan_to_num(_array(scores[None] if scores.ndim == 1 else scores, "scores_NP", shape_NP))
    surest = np.maximum(scores.max(axis=1, keepdims=True, initial=0.0), 1e-12)
    return FAINTEST + (1 - FAINTEST) * np.clip(scores / surest, 0.0, 1.0)


def _with_masks(rgb_HWC: np.ndarray, masks_NHW: np.ndarray) -> np.ndarray:
    """A copy with every mask tinted in its object's colour."""
    tinted = rgb_HWC.copy()
    for number, mask in enumerate(masks_NHW.astype(bool)):
        colour = np.array(COLOURS[number % len(COLOURS)], dtype=np.float32)
        tinted[mask] = (tinted[mask] * (1 - MASK_STRENGTH) + colour * MASK_STRENGTH).astype(np.uint8)
    return tinted


def _array(given: Any, name: str, shape: tuple[int | str, ...]) -> np.ndarray:
    """As an array of that shape, in which letters stand for any length."""
    array = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    fits = array.ndim == len(shape) and all(isinstance(w, str) or w == n for w, n in zip(shape, array.shape))
    if not fits:
        raise LayoutError(f"{name} has shape {array.shape}; expected ({', '.join(map(str, shape))})")
    return array
