"""Refuses what an image model was not made for, before its first layer trips over it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from sidestream.errors import LayoutError


@dataclass(frozen=True)
class SizeRule:
    """The heights and widths that a model takes: one only, or multiples of some pixels, or all from a least one on."""

    only_px: tuple[int, int] | None = None
    multiple_of_px: tuple[int, int] | None = None
    least_px: int | None = None

    def check(self, name: str, height: int, width: int) -> None:
        """Raises ``LayoutError`` for a size that the model does not take."""
        # "Is None" first, so that a model of any size is exported with any size.
        if self.only_px is not None and (height, width) != self.only_px:
            wanted = f"takes {self.only_px[0]} x {self.only_px[1]} only"
        elif self.multiple_of_px is not None and (height % self.multiple_of_px[0] or width % self.multiple_of_px[1]):
            wanted = "takes multiples of " + " x ".join(map(str, self.multiple_of_px))
        elif self.least_px is not None and min(height, width) < self.least_px:
            wanted = f"needs {self.least_px} x {self.least_px} or more"
        else:
            return
        raise LayoutError(
            f"{name} was given {height} x {width} pixels; it {wanted}: resize the pictures, as its input spec says"
        )


ANY_SIZE = SizeRule()


def guard_frames(model: nn.Module, name: str, sizes: SizeRule = ANY_SIZE) -> nn.Module:
    """Make ``model`` raise ``LayoutError`` for anything but float ``frame_BCHW`` with 3 channels; gives it back.

    Also for sizes that it does not take.
    """
    model.register_forward_pre_hook(partial(_check, name, sizes))  # no closure, so that models can be pickled
    return model


def _check(name: str, sizes: SizeRule, module: nn.Module, args: tuple[Any, ...]) -> None:
    if args and isinstance(args[0], Tensor):
        check_frame(name, args[0])
        sizes.check(name, *args[0].shape[2:])


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
