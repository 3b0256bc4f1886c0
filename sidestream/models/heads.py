"""Heads other than classes: heat maps of keypoints and dense masks, on the maps of any clip model, clip or stream.

Xiao, Wu, Wei, "Simple Baselines for Human Pose Estimation and Tracking" (ECCV 2018), section 2: transposed
convolutions that double the maps until a cell is 4 pixels wide, then a 1x1 convolution with one channel per keypoint.
Masks are the same maps, drawn out to the pixels. A head looks at one step in time, so a model keeps its delay.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from sidestream.errors import LayoutError, ModelError
from sidestream.models.clip_layout import as_stream_of
from sidestream.nn.combine import Chain, PerFrame

HeadKind = Literal["classes", "keypoints", "masks"]

CELL_PX = 4
"""Width of a heat map's cell in pixels of the input."""


class DenseHead(nn.Sequential):
    """Maps (B, C, H', W') of one step in time -> (B, num_outputs, H, W).

    ``stride_px``: width of a cell of the maps given, a power of two; of the maps answered it is 4 (``kind``
    "keypoints") or 1 ("masks").
    """

    def __init__(
        self, num_channels: int, num_outputs: int, *, kind: HeadKind, stride_px: int, num_inner: int = 256
    ) -> None:
        num_doublings = (max(stride_px, CELL_PX) // CELL_PX).bit_length() - 1
        layers: list[nn.Module] = []
        for _ in range(num_doublings):
            layers += [
                nn.ConvTranspose2d(num_channels, num_inner, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(num_inner),
                nn.ReLU(inplace=True),
            ]
            num_channels = num_inner
        layers.append(nn.Conv2d(num_channels, num_outputs, 1))
        if kind == "masks":
            to_pixels = stride_px / 2**num_doublings
            layers.append(nn.Upsample(scale_factor=to_pixels, mode="bilinear", align_corners=False))
        super().__init__(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(module.weight, std=0.001)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class DenseModel(nn.Module):
    """A clip model's maps under a dense head: ``clip_BTCHW`` -> (B, T', num_outputs, H / 4, W / 4).

    T' are the steps in time that ``trunk.features`` answers: every frame, or every p-th where the model has temporal
    strides. With ``kind`` "masks" the answers have the size of the frames. Height and width: multiples of
    ``trunk.stride_px``. The trunk's own classifier is taken out.

    Raises ``ModelError`` for a model without maps, ``LayoutError`` for clips of another size.
    """

    def __init__(
        self, trunk: nn.Module, num_outputs: int, *, kind: HeadKind = "keypoints", num_inner: int = 256
    ) -> None:
        super().__init__()
        num_channels, stride_px = _described(trunk)
        if (name := getattr(trunk, "classifier", None)) is not None:
            trunk.set_submodule(name, nn.Identity())
        self.trunk, self.stride_px = trunk, stride_px
        self.head = DenseHead(num_channels, num_outputs, kind=kind, stride_px=stride_px, num_inner=num_inner)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        maps_BTCHW = self.trunk.features(clip_BTCHW)  # type: ignore[operator]
        if any(side % self.stride_px for side in clip_BTCHW.shape[-2:]):
            raise LayoutError(
                f"a model with a dense head was given frames of {tuple(clip_BTCHW.shape[-2:])} pixels; it takes "
                f"multiples of {self.stride_px}, so that its maps lie on the pixels: resize or crop them"
            )
        return self.head(maps_BTCHW.flatten(0, 1)).unflatten(0, maps_BTCHW.shape[:2])

    answers = forward

    def streaming(self) -> Chain:
        """The model on a stream, its parameters shared: maps (B, num_outputs, H, W) of every step in time.

        Raises ``ModelError`` where the trunk has no streaming form. Use it in eval mode.
        """
        if not hasattr(self.trunk, "streaming_features"):
            raise ModelError(f"{type(self.trunk).__name__} has no streaming form; run it on whole clips")
        trunk: Any = self.trunk.streaming_features()  # type: ignore[operator]
        layers = trunk.layers if isinstance(trunk, Chain) else (trunk,)
        return as_stream_of(self, Chain(*layers, PerFrame(self.head)))


def _described(trunk: nn.Module) -> tuple[int, int]:
    """(channels, width of a cell in pixels) of the maps of ``trunk.features``."""
    wanted = ("features", "num_features", "stride_px")
    if missing := [name for name in wanted if getattr(trunk, name, None) is None]:
        raise ModelError(
            f"{type(trunk).__name__} answers no maps (it has no {', '.join(missing)}), so it cannot carry a head for "
            "keypoints or masks; use a clip model of 'sidestream models', or frame_... for an image model"
        )
    return int(trunk.num_features), int(trunk.stride_px)  # type: ignore[arg-type]
