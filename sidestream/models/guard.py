"""Refuses what an image model was not made for, before its first layer trips over it."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from sidestream.errors import LayoutError


def guard_frames(model: nn.Module, name: str) -> nn.Module:
    """Make ``model`` raise ``LayoutError`` for anything but float ``frame_BCHW`` with 3 channels; gives it back."""

    model.register_forward_pre_hook(partial(_check, name))  # no closure, so that models can be pickled
    return model


def _check(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    if args and isinstance(args[0], Tensor):
        check_frame(name, args[0])


def check_frame(name: str, frame_BCHW: Tensor) -> None:
    """Raises ``LayoutError`` unless ``frame_BCHW`` is a float (B, 3, H, W)."""
    shape = tuple(frame_BCHW.shape)
    if len(shape) != 4 or shape[1] != 3:
        hint = ""
        if len(shape) == 5:
            hint = "; it reads single frames: flatten(0, 1) a clip (B, T, 3, H, W), or use a clip model"
        elif len(shape) == 4 and shape[3] == 3:
            hint = "; its axes seem to be B,H,W,C: use permute(0, 3, 1, 2)"
        elif len(shape) == 3:
            hint = "; one frame needs its batch axis: unsqueeze(0)"
        raise LayoutError(f"{name} was given the shape {shape}; expected (B, 3, H, W){hint}")
    if not frame_BCHW.is_floating_point():
        raise LayoutError(f"{name} was given {frame_BCHW.dtype}; expected float, prepared by its input spec")
