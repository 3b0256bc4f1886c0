"""TimeSformer's tokens: patches of every frame, with their place and time, and a class token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestream.errors import LayoutError


@dataclass(frozen=True)
class Size:
    """How large a TimeSformer is; by default the paper's base model."""

    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    patch_px: int = 16
    size_px: tuple[int, int] = (224, 224)
    """(height, width) that the embedding of places is made for."""
    num_frames: int = 8
    """Frames that the embedding of times is made for."""

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.size_px[0] // self.patch_px, self.size_px[1] // self.patch_px


class Embedding(nn.Module):
    """``clip_BTCHW`` -> tokens with their place: class (B, T, D), patches (B, T, H / patch, W / patch, D).

    Raises ``LayoutError`` where height or width is no multiple of the patch.
    """

    def __init__(self, size: Size, *, has_times: bool = True) -> None:
        super().__init__()
        self.size = size
        self.patches = nn.Conv2d(3, size.dim, size.patch_px, stride=size.patch_px)
        self.class_11D = nn.Parameter(torch.zeros(1, 1, size.dim))
        self.places_1ND = nn.Parameter(torch.zeros(1, 1 + size.grid[0] * size.grid[1], size.dim))
        """The class token's, then the patches', row by row."""
        if has_times:
            self.times_1TD = nn.Parameter(torch.zeros(1, size.num_frames, size.dim))

    def forward(self, clip_BTCHW: Tensor) -> tuple[Tensor, Tensor]:
        height, width = clip_BTCHW.shape[-2:]
        if height % self.size.patch_px or width % self.size.patch_px or 0 in (height, width):
            raise LayoutError(
                f"TimeSformer was given frames of {height} x {width} pixels; it needs multiples of its patches of "
                f"{self.size.patch_px}: resize or crop them"
            )
        maps_NDHW = self.patches(clip_BTCHW.flatten(0, 1))
        places_HWD = self._places(maps_NDHW.shape[-2], maps_NDHW.shape[-1])
        patches_BTHWD = maps_NDHW.movedim(1, -1).unflatten(0, clip_BTCHW.shape[:2]) + places_HWD
        class_BTD = (self.class_11D + self.places_1ND[:, :1]).expand(*clip_BTCHW.shape[:2], -1)
        return class_BTD, patches_BTHWD

    def add_times(self, patches_BTHWD: Tensor) -> Tensor:
        """With the embedding of times, stretched to the nearest entry where the number of frames is another one."""
        num_frames = patches_BTHWD.shape[1]
        times_1TD: Tensor = self.times_1TD
        if num_frames != times_1TD.shape[1]:
            times_1TD = F.interpolate(times_1TD.movedim(1, 2), size=num_frames, mode="nearest").movedim(1, 2)
        return patches_BTHWD + times_1TD[0, :, None, None]

    def _places(self, rows: int, columns: int) -> Tensor:
        places_1DHW = self.places_1ND[:, 1:].unflatten(1, self.size.grid).movedim(-1, 1)
        if (rows, columns) != self.size.grid:
            places_1DHW = F.interpolate(places_1DHW, size=(rows, columns), mode="nearest")
        return places_1DHW[0].movedim(0, -1)
