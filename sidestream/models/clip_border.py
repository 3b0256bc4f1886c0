"""The border of clip models: torchvision's video nets read B,C,T,H,W, everything here speaks B,T,C,H,W."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sidestream.models.clip_layout import check_clip


class ClipBorder(nn.Module):
    """Wraps ``net``, which reads ``clip_BCTHW``, so that it reads ``clip_BTCHW``; what it answers is unchanged.

    Raises ``LayoutError`` for other axes.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @property
    def weights_target(self) -> nn.Module:
        """The net whose keys a weights file has."""
        return self.net

    def forward(self, clip_BTCHW: Tensor) -> Any:
        check_clip(type(self.net).__name__, clip_BTCHW)
        return self.net(clip_BTCHW.transpose(1, 2))
