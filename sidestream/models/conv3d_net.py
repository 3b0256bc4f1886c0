"""3D convolutional nets as clip models and, on the same parameters, as chains of streaming layers.

The layers of a net are put in a row once, as streaming layers; what the model computes on a clip is their clip form,
what it computes on a stream their step form. So the two agree on every answer, the edges of the clip included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.errors import LayoutError, ModelError
from sidestream.models.c3d import C3DLayers
from sidestream.models.clip_layout import ClipForm, as_stream_of, check_clip
from sidestream.models.conv3d_blocks import streaming_form
from sidestream.models.i3d_layers import POOLED_FRAMES, PooledFrames
from sidestream.nn.combine import Chain, PerFrame
from sidestream.nn.pool import AvgPool3d
from sidestream.nn.steppable import Steppable


@dataclass(frozen=True)
class Shape:
    """What a kind of net is made of and needs."""

    classifier: str
    """Path of the layer that gives the logits."""
    num_features: int
    stride_px: int
    """Width of a cell of the last maps, in pixels."""
    min_frames: int
    """Fewest frames of a clip; 1 for every causal variant."""
    min_px: int


class Conv3dNet(nn.Module):
    """A 3D convolutional net: ``clip_BTCHW`` -> logits (B, num_classes), the mean of its answers over time.

    ``net``: torchvision's VideoResNet (R3D, MC3, R(2+1)D) or S3D, or ``C3DLayers``; its parameters keep their names,
    so its weights files load. Any length from ``min_frames`` on, any size from ``min_px`` on. ``is_causal``: no answer
    sees a later frame, since all temporal padding lies in the past ("masked" convolutions); it takes the same weights,
    which were not trained for it. Layers that change a weight on its way (``parametrize``, ``prune``) are not followed.

    Raises ``LayoutError`` for other axes and for clips that are too short or too small, ``ModelError`` for another
    kind of net.
    """

    def __init__(self, net: nn.Module, *, is_causal: bool = False) -> None:
        super().__init__()
        self.net, self.is_causal = net, is_causal
        shape = shape_of(net)
        self.classifier, self.num_features, self.stride_px = shape.classifier, shape.num_features, shape.stride_px
        self.min_frames, self.min_px = 1 if is_causal else shape.min_frames, shape.min_px
        self._clip_form = ClipForm(net, self._chains)

    @property
    def weights_target(self) -> nn.Module:
        """The net whose keys a weights file has."""
        return self.net

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self.answers(clip_BTCHW).mean(1)

    def answers(self, clip_BTCHW: Tensor) -> Tensor:
        """Logits of every step in time (B, T', num_classes): the clip form of ``streaming``."""
        return self._clip_form()[1](self.features(clip_BTCHW))

    def features(self, clip_BTCHW: Tensor) -> Tensor:
        """Maps before the last pooling, (B, T', num_features, H / stride_px, W / stride_px)."""
        name = type(self.net).__name__
        check_clip(name, clip_BTCHW, min_frames=self.min_frames)
        if min(clip_BTCHW.shape[3:]) < self.min_px:
            raise LayoutError(
                f"{name} was given frames of {tuple(clip_BTCHW.shape[3:])} pixels; it needs {self.min_px} or more in "
                "height and width: give larger ones"
            )
        return self._clip_form()[0](clip_BTCHW)

    def streaming(self) -> Chain:
        """The net on a stream, its parameters shared: logits (B, num_classes) of every step in time.

        One every ``period_ticks``, and ``delay_ticks`` late (0 where causal); its clip form is ``answers``. Use it in
        eval mode: in training mode batch norms work frame by frame.
        """
        return as_stream_of(self, Chain(*self._trunk(), *self._head()))

    def streaming_features(self) -> Chain:
        """``features`` on a stream: maps (B, num_features, H', W')."""
        return as_stream_of(self, Chain(*self._trunk()))

    def _chains(self) -> tuple[Chain, Chain]:
        return Chain(*self._trunk()), Chain(*self._head())

    def _trunk(self) -> Iterator[Steppable]:
        return (streaming_form(module, is_causal=self.is_causal) for module in _trunk_modules(self.net))

    def _head(self) -> Iterator[Steppable]:
        """Pooling and classifier: of every step, or where the net pools over time at last, of steps together."""
        from torchvision.models.video import S3D

        if isinstance(self.net, C3DLayers):
            yield streaming_form(self.net.pool5, is_causal=self.is_causal)
            yield PerFrame(self.net.classifier())
        elif isinstance(self.net, S3D):
            yield PerFrame(PooledFrames())
            before = POOLED_FRAMES - 1 if self.is_causal else 0
            yield AvgPool3d((POOLED_FRAMES, 1, 1), stride=1, time_padding=(before, 0))
            yield PerFrame(_MeanOverPlaces(self.net.classifier))
        else:
            yield PerFrame(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), self.net.get_submodule("fc")))


class _MeanOverPlaces(nn.Module):
    """A classifier on (B, C, T, H, W) for the maps of one frame."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        return torch.mean(self.classifier(maps_BCHW.unsqueeze(2)), dim=(2, 3, 4))


def shape_of(net: nn.Module) -> Shape:
    """What is needed to run ``net``. Raises ``ModelError`` for a kind that is not known here."""
    from torchvision.models.video import S3D
    from torchvision.models.video.resnet import VideoResNet

    if isinstance(net, C3DLayers):
        return Shape("net.fc8", net.num_features, stride_px=16, min_frames=16, min_px=16)
    if isinstance(net, S3D):
        return Shape("net.classifier", net.classifier[1].in_channels, stride_px=32, min_frames=13, min_px=17)
    if isinstance(net, VideoResNet):
        return Shape("net.fc", net.fc.in_features, stride_px=16, min_frames=1, min_px=1)
    raise ModelError(
        f"{type(net).__name__} has no streaming form here; give torchvision's VideoResNet or S3D, or C3DLayers"
    )


def _trunk_modules(net: Any) -> Iterator[nn.Module]:
    """The modules before the last pooling, in order, on (B, C, T, H, W)."""
    if isinstance(net, C3DLayers):
        yield from net.trunk()
    elif hasattr(net, "features"):
        yield from net.features
    else:
        yield net.stem
        for group in (net.layer1, net.layer2, net.layer3, net.layer4):
            yield from group
