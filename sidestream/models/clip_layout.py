"""What clip models that also stream share: the check of what they are given, and what their streams want to be fed."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from sidestream.errors import LayoutError
from sidestream.models.info import attach_info, info_of
from sidestream.nn.combine import Chain


def check_clip(family: str, clip_BTCHW: Tensor, *, min_frames: int = 1) -> None:
    """Raises ``LayoutError`` unless ``clip_BTCHW`` is (B, T, 3, H, W) with ``min_frames`` frames or more."""
    shape = tuple(clip_BTCHW.shape)
    if len(shape) != 5 or shape[2] != 3:
        hint = "; its axes seem to be B,C,T,H,W: use transpose(1, 2)" if len(shape) == 5 and shape[1] == 3 else ""
        raise LayoutError(f"{family} was given the shape {shape}; expected (B, T, 3, H, W){hint}")
    if shape[1] < min_frames:
        raise LayoutError(f"{family} was given {shape[1]} frames; it needs {min_frames} or more: give a longer clip")
    if not clip_BTCHW.is_floating_point():
        raise LayoutError(f"{family} was given {clip_BTCHW.dtype}; expected float, prepared by its input spec")


def as_stream_of(model: nn.Module, chain: Chain) -> Chain:
    """``chain``, the streaming form of ``model``: in its mode, and with its info (but fed one frame at a time)."""
    chain.train(model.training)
    if (own := info_of(model)) is not None:
        spec = own.input_spec.replace(layout="BCHW", num_frames=1, min_frames=None, delay_ticks=chain.delay_ticks)
        attach_info(chain, replace(own, input_spec=spec))
    return chain
