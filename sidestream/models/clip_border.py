"""The border of clip models: torchvision's video nets read B,C,T,H,W, everything here speaks B,T,C,H,W."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sidestream.errors import LayoutError
from sidestream.models.clip_layout import check_clip
from sidestream.models.guard import ANY_SIZE, SizeRule


class ClipBorder(nn.Module):
    """Wraps ``net``, which reads ``clip_BCTHW``, so that it reads ``clip_BTCHW``; what it answers is unchanged.

    ``only_frames``: the one length that the net takes. Raises ``LayoutError`` for other axes, lengths and sizes than
    the net takes.
    """

    def __init__(
        self, net: nn.Module, *, sizes: SizeRule = ANY_SIZE, min_frames: int = 1, only_frames: int | None = None
    ) -> None:
        super().__init__()
        self.net = net
        self.sizes, self.min_frames, self.only_frames = sizes, min_frames, only_frames

    @property
    def weights_target(self) -> nn.Module:
        """The net whose keys a weights file has."""
        return self.net

    def forward(self, clip_BTCHW: Tensor) -> Any:
        name = type(self.net).__name__
        check_clip(name, clip_BTCHW, min_frames=self.min_frames)
        if self.only_frames is not None and clip_BTCHW.shape[1] != self.only_frames:
            raise LayoutError(
                f"{name} was given {clip_BTCHW.shape[1]} frames; it takes clips of {self.only_frames} only: "
                "sample as its input spec says"
            )
        self.sizes.check(name, *clip_BTCHW.shape[3:])
        return self.net(clip_BTCHW.transpose(1, 2))
