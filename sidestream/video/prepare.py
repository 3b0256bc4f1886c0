"""``prepare``: from pixels to what a model wants to be fed; ``unprepare_points`` and ``unprepare_boxes`` lead back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sidestream.errors import LayoutError
from sidestream.types import Clip, Frame, InputSpec


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a picture's pixels land: resized to ``resized_px``, then cut out at (top, left). All (height, width)."""

    frame_size_px: tuple[int, int]
    resized_px: tuple[int, int]
    corner_px: tuple[int, int]


def placement(frame_size_px: tuple[int, int], spec: InputSpec) -> Placement:
    """The resize and centre crop that ``spec`` asks of a frame of that size. Pure arithmetic.

    The longer side is rounded down and the crop's corner to the nearest even number in a tie, as torchvision does.

    Raises:
        LayoutError: the crop is larger than the resized picture.
    """
    height, width = frame_size_px
    if spec.resize_px is None:
        return Placement(frame_size_px, spec.size_px, (0, 0))
    long_px = int(spec.resize_px * max(height, width) / min(height, width))
    resized = (spec.resize_px, long_px) if height <= width else (long_px, spec.resize_px)
    crop = spec.size_px
    if crop[0] > resized[0] or crop[1] > resized[1]:
        raise LayoutError(
            f"a frame of {frame_size_px} resized to {resized} is smaller than the crop {crop}; raise resize_px, "
            "now {spec.resize_px}, or set it to None".replace("{spec.resize_px}", str(spec.resize_px))
        )
    return Placement(frame_size_px, resized, (round((resized[0] - crop[0]) / 2.0), round((resized[1] - crop[1]) / 2.0)))


def prepare(given: Frame | Clip | Tensor, spec: InputSpec) -> Tensor:
    """Resize, centre crop and normalise.

    Args:
        given: a Frame; a Clip; or a float tensor with values in [0, 1], (B, 3, H, W) or (B, T, 3, H, W).
        spec: what the model wants.

    Returns:
        float32, (1, 3, h, w) for a Frame, (1, T, 3, h, w) for a Clip, else the tensor's own leading axes; (h, w) is
        ``spec.size_px``. Frames and clips are resized as uint8 (faster, rounded to whole levels), tensors as float.

    Raises:
        LayoutError: wrong axes, channels, type or range, or a crop larger than the picture.
    """
    if isinstance(given, Frame):
        return _from_bytes(given.rgb_HWC.unsqueeze(0), spec)
    if isinstance(given, Clip):
        return _from_bytes(given.rgb_THWC, spec).unsqueeze(0)
    _check_tensor(given)
    flat_NCHW = given.reshape(-1, *given.shape[-3:])
    ready_NCHW = normalise(_fit(flat_NCHW.float(), spec), spec)
    return ready_NCHW.reshape(*given.shape[:-2], *spec.size_px)


def normalise(pixels_NCHW: Tensor, spec: InputSpec) -> Tensor:
    """(pixels in [0, 1] - mean) / std, per channel."""
    mean = torch.tensor(spec.mean, device=pixels_NCHW.device).view(3, 1, 1)
    std = torch.tensor(spec.std, device=pixels_NCHW.device).view(3, 1, 1)
    return (pixels_NCHW - mean) / std


def unprepare_points(points_NP2_px: Tensor, frame_size_px: tuple[int, int], spec: InputSpec) -> Tensor:
    """Points (..., 2) as x, y in pixels of the model's input -> in pixels of the frame. Exact inverse of the resize.

    Pixel i covers [i, i + 1), so the middle of the first pixel is 0.5.
    """
    where = placement(frame_size_px, spec)
    top, left = where.corner_px
    corner = points_NP2_px.new_tensor([left, top])
    return (points_NP2_px + corner) * _frame_per_resized(where, points_NP2_px)


def prepare_points(points_NP2_px: Tensor, frame_size_px: tuple[int, int], spec: InputSpec) -> Tensor:
    """Points (..., 2) as x, y in pixels of the frame -> in pixels of the model's input."""
    where = placement(frame_size_px, spec)
    top, left = where.corner_px
    return points_NP2_px / _frame_per_resized(where, points_NP2_px) - points_NP2_px.new_tensor([left, top])


def unprepare_boxes(boxes_N4_px: Tensor, frame_size_px: tuple[int, int], spec: InputSpec) -> Tensor:
    """Boxes (..., 4) as x_min, y_min, x_max, y_max in pixels of the model's input -> in pixels of the frame."""
    corners = boxes_N4_px.reshape(*boxes_N4_px.shape[:-1], 2, 2)
    return unprepare_points(corners, frame_size_px, spec).reshape(boxes_N4_px.shape)


def prepare_boxes(boxes_N4_px: Tensor, frame_size_px: tuple[int, int], spec: InputSpec) -> Tensor:
    """Boxes (..., 4) in pixels of the frame -> in pixels of the model's input (they may reach beyond it)."""
    corners = boxes_N4_px.reshape(*boxes_N4_px.shape[:-1], 2, 2)
    return prepare_points(corners, frame_size_px, spec).reshape(boxes_N4_px.shape)


def _frame_per_resized(where: Placement, like: Tensor) -> Tensor:
    (height, width), (resized_height, resized_width) = where.frame_size_px, where.resized_px
    return like.new_tensor([width / resized_width, height / resized_height])


def _from_bytes(rgb_NHWC: Tensor, spec: InputSpec) -> Tensor:
    if rgb_NHWC.dtype != torch.uint8 or rgb_NHWC.ndim != 4 or rgb_NHWC.shape[-1] != 3:
        given = f"{rgb_NHWC.dtype} of shape {tuple(rgb_NHWC.shape)}"
        raise LayoutError(f"pixels of a Frame or Clip are {given}; expected torch.uint8 with 3 channels last")
    fitted = _fit(rgb_NHWC.permute(0, 3, 1, 2), spec)
    mean, std = torch.tensor(spec.mean) * 255.0, torch.tensor(spec.std) * 255.0
    fitted = fitted.to(torch.float32, memory_format=torch.contiguous_format)
    return fitted.sub_(mean.view(3, 1, 1).to(fitted.device)).div_(std.view(3, 1, 1).to(fitted.device))


def _fit(pixels_NCHW: Tensor, spec: InputSpec) -> Tensor:
    """Resize (anti-aliased) and centre crop; float or uint8 in, the same out."""
    if spec.interpolation not in ("bilinear", "bicubic"):
        raise LayoutError(f"interpolation is {spec.interpolation!r}; use 'bilinear' or 'bicubic'")
    where = placement((int(pixels_NCHW.shape[-2]), int(pixels_NCHW.shape[-1])), spec)
    if where.resized_px != where.frame_size_px:
        pixels_NCHW = F.interpolate(pixels_NCHW, where.resized_px, mode=spec.interpolation, antialias=True)
    (top, left), (height, width) = where.corner_px, spec.size_px
    return pixels_NCHW[..., top : top + height, left : left + width]


def _check_tensor(given: Any) -> None:
    expected = "expected float in [0, 1], shape (B, 3, H, W) or (B, T, 3, H, W)"
    if not isinstance(given, Tensor):
        raise LayoutError(f"prepare was given {type(given).__name__}; {expected}, or a Frame, or a Clip")
    what = f"prepare was given {given.dtype} of shape {tuple(given.shape)}"
    if not given.is_floating_point():
        raise LayoutError(f"{what}; {expected}: for bytes write pixels.float() / 255")
    if given.ndim not in (4, 5):
        raise LayoutError(f"{what}; {expected}: it has {given.ndim} axes")
    if given.shape[-3] != 3:
        hint = "channels seem to be last: use permute" if given.shape[-1] == 3 else f"it has {given.shape[-3]} channels"
        raise LayoutError(f"{what}; {expected}: {hint}")
    if given.numel() == 0:
        raise LayoutError(f"{what}, which holds no pixel; {expected}")
    low, high = (float(each) for each in torch.aminmax(given.detach()))
    if not (low >= 0.0 and high <= 1.0):
        raise LayoutError(
            f"{what} with values from {low:g} to {high:g}; {expected}: divide bytes by 255, do not normalise"
        )
