"""The building blocks of torchvision's 3D convolutional nets as streaming layers, on the same parameters.

Each goes from its module on (B, C, T, H, W) to a layer with a clip form and a step form, causal or not.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sidestream.nn.combine import Chain, Parallel, Residual
from sidestream.nn.convert import ELEMENTWISE, to_streaming
from sidestream.nn.steppable import Steppable


class OnMaps(Steppable):
    """A module on (B, C, T, H, W) that treats every frame alike: batch norms, activations. No memory.

    Unlike ``PerFrame`` it leaves time where 3D convolutions have it, so that a clip is not laid out anew around it,
    and holds the very module, which follows its net from training to evaluation mode. In training mode the statistics
    of a batch norm are those of the clip in clip form, of one frame in step form.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def init_state(self, frame_BCHW: Tensor) -> None:
        return None

    def step(self, frame_BCHW: Tensor, state: None) -> tuple[Tensor, None]:
        return self.module(frame_BCHW.unsqueeze(2)).squeeze(2), None

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self.module(clip_BTCHW.transpose(1, 2)).transpose(1, 2)

    def blank(self, frame_BCHW: Tensor) -> Tensor:
        return frame_BCHW.new_zeros(frame_BCHW.shape)


def streaming_form(module: nn.Module, *, is_causal: bool = False) -> Steppable:
    """The streaming form of a part of a 3D net: torchvision's residual and Inception blocks, and what
    ``to_streaming`` takes. An activation that works in place must follow a layer that answers with new memory.

    ``is_causal``: all temporal padding lies in the past, so other numbers, and no delay.
    Raises ``ModelError`` for a module without a streaming form.
    """
    from torchvision.models.video.resnet import BasicBlock, Bottleneck
    from torchvision.models.video.s3d import SepInceptionBlock3D

    if isinstance(module, BasicBlock | Bottleneck):
        return _residual(module, is_causal)
    if isinstance(module, SepInceptionBlock3D):
        branches = [module.branch0, module.branch1, module.branch2, module.branch3]
        return Parallel(*(streaming_form(b, is_causal=is_causal) for b in branches), combine="concat")
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return Chain(*(streaming_form(child, is_causal=is_causal) for child in module))
    if isinstance(module, (nn.BatchNorm3d, *ELEMENTWISE)):
        return OnMaps(module)
    return to_streaming(module, is_causal=is_causal)


def _residual(block: Any, is_causal: bool) -> Chain:
    """relu(convolutions + skip), where the skip is projected if the block has a stride or more channels."""
    body = [getattr(block, name) for name in ("conv1", "conv2", "conv3") if hasattr(block, name)]
    skip = None if block.downsample is None else streaming_form(block.downsample, is_causal=is_causal)
    residual = Residual(Chain(*(streaming_form(part, is_causal=is_causal) for part in body)), skip)
    return Chain(residual, OnMaps(block.relu))
