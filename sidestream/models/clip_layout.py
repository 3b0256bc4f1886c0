"""What clip models that also stream share: the check of what they are given, and what their streams want to be fed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from sidestream.errors import LayoutError
from sidestream.models.info import attach_info, info_of
from sidestream.nn.combine import Chain


def check_clip(family: str, clip_BTCHW: Tensor, *, min_frames: int = 1) -> None:
    """Raises ``LayoutError`` unless ``clip_BTCHW`` is (B, T, 3, H, W) with ``min_frames`` frames or more."""
    shape = tuple(clip_BTCHW.shape)
    if len(shape) != 5 or shape[2] != 3:
        hint = "; its axes seem to be B,C,T,H,W: use transpose(1, 2)" if len(shape) == 5 and shape[1] == 3 else ""
        if len(shape) == 4 and shape[1] == 3:
            hint = "; it reads clips: single frames go to its streaming(), where it has one, or to nn.SlidingWindow"
        raise LayoutError(f"{family} was given the shape {shape}; expected (B, T, 3, H, W){hint}")
    if shape[1] < min_frames:
        raise LayoutError(f"{family} was given {shape[1]} frames; it needs {min_frames} or more: give a longer clip")
    if not clip_BTCHW.is_floating_point():
        raise LayoutError(f"{family} was given {clip_BTCHW.dtype}; expected float, prepared by its input spec")


class ClipForm:
    """The streaming layers whose clip form a model runs on clips, on the model's parameters.

    Streaming layers take parameters over when they are made. So they are made again when parameters or modules of
    ``net`` are other ones than then (``to_empty``, ``load_state_dict(assign=True)``, ``functional_call``, a classifier
    put in another's place). No module itself, so that the shared parameters are not listed twice.
    """

    def __init__(self, net: nn.Module, make: Callable[[], tuple[Chain, ...]]) -> None:
        self._net, self._make = net, make
        self._chains, self._made_of = make(), tuple(self._parts())

    def __call__(self) -> tuple[Chain, ...]:
        if not torch.compiler.is_compiling() and self._made_of != (parts := tuple(self._parts())):
            self._chains, self._made_of = self._make(), parts
        return self._chains

    def _parts(self) -> Iterator[int]:
        for module in self._net.modules():
            yield id(module)
            yield from map(id, module._parameters.values())


def as_stream_of(model: nn.Module, chain: Chain) -> Chain:
    """``chain``, the streaming form of ``model``: in its mode, and with its info (but fed one frame at a time)."""
    shared = {id(module) for module in model.modules()}  # these keep the modes that they have
    for module in chain.modules():
        if id(module) not in shared:
            module.training = model.training
    if (own := info_of(model)) is not None:
        spec = own.input_spec.replace(layout="BCHW", num_frames=1, min_frames=None, delay_ticks=chain.delay_ticks)
        attach_info(chain, replace(own, input_spec=spec))
    return chain
