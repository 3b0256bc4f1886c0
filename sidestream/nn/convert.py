"""Ordinary torch modules to streaming layers, with their parameters shared, not copied."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

from torch import Tensor, nn

from sidestream.errors import ModelError
from sidestream.nn.combine import Chain, PerFrame
from sidestream.nn.conv3d import CausalConv3d, Conv3d
from sidestream.nn.pool import AvgPool3d, MaxPool3d
from sidestream.nn.steppable import Steppable

_Module = TypeVar("_Module", bound=nn.Module)

ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.Dropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus,
)  # fmt: skip
"""Modules that treat every number alike, whatever the axes."""


class OverChannels(nn.Module):
    """A module over the last axis, applied to the channels: axis 1 of a map (B, C, H, W), the last one otherwise."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, frame: Tensor) -> Tensor:
        return self.module(frame.movedim(1, -1)).movedim(-1, 1) if frame.ndim == 4 else self.module(frame)


def lift(module: nn.Module) -> Steppable:
    """A module that looks at one frame at a time, on streams; a streaming layer stays as it is.

    Linear and LayerNorm work over the channels, also of maps (B, C, H, W). Batch norms are to be used in evaluation
    mode: in training mode the statistics are those of the clip in clip form, but of one frame in step form.
    """
    if isinstance(module, Steppable):
        return module
    if isinstance(module, nn.Linear | nn.LayerNorm):
        return PerFrame(OverChannels(module))
    if isinstance(module, nn.BatchNorm3d):
        return PerFrame(_flat_batch_norm(module))
    return PerFrame(module)


def to_streaming(module: nn.Module, *, is_causal: bool = False) -> Steppable:
    """The streaming form of a network on (B, C, T, H, W): the same numbers, on (B, T, C, H, W) and frame by frame.

    Takes Sequential (nested too) of Conv3d, MaxPool3d, AvgPool3d, BatchNorm3d and element-wise modules, and streaming
    layers in between. ``is_causal``: convolutions and poolings see no later frame (their temporal padding moves to
    the front), so other numbers, and no delay.
    """
    if isinstance(module, Steppable):
        return module
    if _works_as(module, nn.Sequential):
        return Chain(*(to_streaming(child, is_causal=is_causal) for child in module))
    if _works_as(module, nn.Conv3d):
        return CausalConv3d.from_torch(module) if is_causal else Conv3d.from_torch(module)
    if _works_as(module, nn.MaxPool3d):
        return _max_pool(module, is_causal)
    if _works_as(module, nn.AvgPool3d):
        return _average_pool(module, is_causal)
    lifted: tuple[type[nn.Module], ...] = (nn.BatchNorm3d, *ELEMENTWISE)
    if any(_works_as(module, kind) for kind in lifted):
        return lift(module)
    size = module.output_size if isinstance(module, nn.AdaptiveAvgPool3d) else None
    if isinstance(size, tuple) and size[0] is None:
        return PerFrame(nn.AdaptiveAvgPool2d(size[1:]))
    raise ModelError(
        f"{type(module).__name__} has no streaming form of its own; put a streaming layer in its place, as "
        "lift(module) for one that works frame by frame, or RunningMean() for a mean over all time"
    )


def _works_as(module: nn.Module, kind: type[_Module]) -> TypeGuard[_Module]:
    """Whether it is of that kind and, where it is a subclass, still computes the same."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def _flat_batch_norm(norm: nn.BatchNorm3d) -> nn.BatchNorm2d:
    """The same batch norm for one frame: parameters and running statistics are shared."""
    flat = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    flat._parameters, flat._buffers = norm._parameters, norm._buffers
    return flat.train(norm.training)


def _max_pool(pool: nn.MaxPool3d, is_causal: bool) -> MaxPool3d:
    if pool.ceil_mode or pool.return_indices or pool.dilation not in (1, (1, 1, 1)):
        raise ModelError(f"{pool}: ceil_mode, return_indices and dilation have no streaming form; leave them out")
    return MaxPool3d(pool.kernel_size, stride=pool.stride, padding=pool.padding, is_causal=is_causal)


def _average_pool(pool: nn.AvgPool3d, is_causal: bool) -> AvgPool3d:
    is_padded = pool.padding not in (0, (0, 0, 0))
    if pool.ceil_mode or pool.divisor_override is not None or (is_padded and not pool.count_include_pad):
        raise ModelError(
            f"{pool}: ceil_mode, divisor_override and count_include_pad=False have no streaming form; "
            "leave them out, or pad nothing"
        )
    return AvgPool3d(pool.kernel_size, stride=pool.stride, padding=pool.padding, is_causal=is_causal)
