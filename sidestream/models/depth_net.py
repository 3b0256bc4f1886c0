"""``DepthNet``: a net defined once, as blocks in order of depth, to be run in sequence, semi-parallel or parallel.

Massively Parallel Video Networks (Carreira, Patraucean et al., ECCV 2018). A block names the earlier blocks whose
outputs it reads; delays are given to these links by a wiring (``circuit.net_stages.net_circuit``). The clip form here,
``answers``, is the sequential one: all blocks on the same frame.

With feedback one early block also reads the last answer: its concatenation to what the block's first convolution reads,
the new weights of that convolution zero, so that the net begins as the one without. Answers go in as probabilities:
classes by softmax, heat maps divided by their largest cell (a net that has not answered yet says "anywhere"). That is
our reading; where the paper's feedback enters, and how, is not known to us.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestream.errors import LayoutError
from sidestream.models.clip_layout import as_stream_of, check_clip
from sidestream.models.heads import DenseHead, HeadKind
from sidestream.nn.combine import Chain, PerFrame
from sidestream.nn.steppable import Steppable


@dataclass(frozen=True)
class Block:
    """One stage to be: a module on frames, ``layer(*inputs)``, or a ``Steppable`` whose input is one or a tuple."""

    name: str
    layer: nn.Module
    reads: tuple[int, ...]
    """Numbers of the blocks (from 1) whose outputs it is given, in order; 0 is the frame."""
    reads_answer: bool = False
    """Its last input is the answer of the tick before."""


class DepthNet(nn.Module, ABC):
    """``clip_BTCHW`` -> logits (B, num_outputs), the mean over the frames; with a dense head maps of every frame.

    Any number of frames from one on, any size from ``stride_px`` on (dense heads: multiples of it). Raises
    ``LayoutError`` for others.
    """

    classifier: str
    """Path of the last layer."""
    num_features: int
    """Channels of ``features``."""
    stride_px: int
    """Width of a cell of ``features``."""
    head: nn.Module
    """Behind the maps, where the net has one of its own, or a dense one."""
    num_inner = 256
    """Channels inside of a dense head."""
    feedback_into = 2
    """The block that reads the last answer."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        self.is_dense = self.has_feedback = False

    @abstractmethod
    def trunk_blocks(self) -> list[Block]:
        """The blocks up to the maps of ``features``."""

    @abstractmethod
    def class_head(self) -> nn.Module:
        """From those maps to logits: a module on frames, or a ``Steppable``."""

    @property
    @abstractmethod
    def fed_module(self) -> nn.Module:
        """The part of block ``feedback_into`` that has ``feedback``: None, or the weights for the answer's channels."""

    @abstractmethod
    def make_feedback(self, num_channels: int) -> None:
        """Give ``fed_module`` the weights, zeros, for ``num_channels`` more channels."""

    def depth_blocks(self) -> list[Block]:
        """The stages of the net; the head is part of the last."""
        *blocks, last = self.trunk_blocks()
        head = self.head if self.is_dense else self.class_head()
        blocks.append(replace(last, layer=in_a_row(last.layer, head)))
        if self.has_feedback:
            fed = blocks[self.feedback_into - 1]
            blocks[self.feedback_into - 1] = replace(fed, reads_answer=True)
        return blocks

    def with_dense_head(self, num_outputs: int, kind: HeadKind = "keypoints") -> DepthNet:
        """Heat maps (cells of 4 px) or masks of every frame in place of classes. Changes the net; before feedback."""
        self.remove_class_head()
        self.head = DenseHead(
            self.num_features, num_outputs, kind=kind, stride_px=self.stride_px, num_inner=self.num_inner
        )
        self.is_dense, self.num_outputs = True, num_outputs
        return self

    @abstractmethod
    def remove_class_head(self) -> None: ...

    def add_feedback(self) -> DepthNet:
        """From now on the last answer is read too. Adds parameters, zeros. Loading weights that have them calls it."""
        if not self.has_feedback:
            self.make_feedback(self.num_outputs)
            self.has_feedback = True
        return self

    def remove_feedback(self) -> DepthNet:
        """Back to the net without; the weights are lost."""
        self.fed_module.feedback = None  # type: ignore[assignment]  # modules say Tensor or Module
        self.has_feedback = False
        return self

    def grow_for(self, keys: Iterable[str]) -> Callable[[], object] | None:
        """Add feedback if weights with these keys have it and the net has not; give what undoes that."""
        if self.has_feedback or not any(key.endswith("feedback.weight") for key in keys):
            return None
        self.add_feedback()
        return self.remove_feedback

    def no_answer(self, like: Tensor) -> Tensor:
        """What is fed back before there is an answer; for frames of any size, and any number of streams."""
        return like.new_zeros(1, self.num_outputs, *((1, 1) if self.is_dense else ()))

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        answers = self.answers(clip_BTCHW)
        return answers if self.is_dense else answers.mean(1)

    def answers(self, clip_BTCHW: Tensor) -> Tensor:
        """Logits of every frame (B, T, num_outputs), or its maps: the clip form of ``streaming``."""
        self._check(clip_BTCHW)
        if self.has_feedback:
            return DepthStream(self)(clip_BTCHW)
        return self._on_clip(self.depth_blocks(), clip_BTCHW)

    def features(self, clip_BTCHW: Tensor) -> Tensor:
        """Maps of every frame before the head, (B, T, num_features, H', W'); only without feedback."""
        self._check(clip_BTCHW)
        if self.has_feedback:
            raise LayoutError("a net with feedback makes no maps without its answers; ask for answers(clip)")
        return self._on_clip(self.trunk_blocks(), clip_BTCHW)

    def streaming(self) -> Chain:
        """The net on a stream, its parameters shared: an answer for every frame, at once."""
        return self._stream(self.depth_blocks())

    def streaming_features(self) -> Chain:
        """``features`` on a stream."""
        return self._stream(self.trunk_blocks())

    def _stream(self, blocks: list[Block]) -> Chain:
        layers = [block.layer for block in blocks]
        if self.has_feedback:
            return as_stream_of(self, Chain(DepthStream(self)))
        check = FrameCheck(self.stride_px, self.is_dense)
        if all(block.reads == (n,) and isinstance(block.layer, Steppable) for n, block in enumerate(blocks)):
            flat = [each for layer in layers for each in (layer.layers if isinstance(layer, Chain) else (layer,))]
            return as_stream_of(self, Chain(PerFrame(check), *flat))  # type: ignore[arg-type]
        return as_stream_of(self, Chain(PerFrame(OnFrame(blocks, check))))

    def _on_clip(self, blocks: Sequence[Block], clip_BTCHW: Tensor) -> Tensor:
        made = [clip_BTCHW]
        for block in blocks:
            made.append(on_clip(block.layer, [made[n] for n in block.reads]))
        return made[-1]

    def _check(self, clip_BTCHW: Tensor) -> None:
        check_clip("the net", clip_BTCHW)
        self.check_frame(clip_BTCHW[:, 0])

    def check_frame(self, frame_BCHW: Tensor) -> None:
        """Raises ``LayoutError`` for frames of a size that the net does not take."""
        FrameCheck(self.stride_px, self.is_dense)(frame_BCHW)


class FrameCheck(nn.Module):
    """Frames as they are; ``LayoutError`` for those whose cells would not lie on the frame."""

    def __init__(self, stride_px: int, is_dense: bool) -> None:
        super().__init__()
        self.stride_px, self.is_dense = stride_px, is_dense

    def forward(self, frame_BCHW: Tensor) -> Tensor:
        (height, width), stride = frame_BCHW.shape[-2:], self.stride_px
        if min(height, width) < stride or (self.is_dense and (height % stride or width % stride)):
            wanted = f"takes multiples of {stride}" if self.is_dense else f"needs {stride} px or more"
            raise LayoutError(f"the net was given frames of {height} x {width} px; it {wanted}: resize or crop them")
        return frame_BCHW


class OnFrame(nn.Module):
    """Blocks without memory on one frame."""

    def __init__(self, blocks: Sequence[Block], check: FrameCheck) -> None:
        super().__init__()
        self.check = check
        self.layers = nn.ModuleList([block.layer for block in blocks])
        self.reads = [block.reads for block in blocks]

    def forward(self, frame_BCHW: Tensor) -> Tensor:
        made = [self.check(frame_BCHW)]
        for layer, reads in zip(self.layers, self.reads, strict=True):
            made.append(layer(*(made[n] for n in reads)))
        return made[-1]


class DepthStream(Steppable):
    """All blocks of a net with feedback, frame by frame. State: the last answer, and a state per block."""

    def __init__(self, net: DepthNet) -> None:
        super().__init__()
        self._blocks, self._no_answer, self._check = net.depth_blocks(), net.no_answer, net.check_frame
        self.layers = nn.ModuleList([block.layer for block in self._blocks])

    def init_state(self, frame_BCHW: Tensor) -> Any:
        self._check(frame_BCHW)
        return self._no_answer(frame_BCHW), (None,) * len(self._blocks)

    def step(self, frame_BCHW: Tensor, state: Any) -> tuple[Tensor, Any]:
        last, states = state
        made, after = [frame_BCHW], []
        for block, own in zip(self._blocks, states, strict=True):
            inputs = tuple(made[n] for n in block.reads) + ((last,) if block.reads_answer else ())
            value, own = step_of(block.layer, inputs, own)
            made.append(value)
            after.append(own)
        return made[-1], (made[-1], tuple(after))

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        state, answers = self.init_state(clip_BTCHW[:, 0]), []
        for frame_BCHW in clip_BTCHW.unbind(1):
            answer, state = self.step(frame_BCHW, state)
            answers.append(answer)
        return torch.stack(answers, 1)


class Composed(nn.Module):
    """A module of several inputs, and one behind it."""

    def __init__(self, first: nn.Module, then: nn.Module) -> None:
        super().__init__()
        self.first, self.then = first, then

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.then(self.first(*inputs))


def in_a_row(layer: nn.Module, head: nn.Module) -> nn.Module:
    """``head`` behind ``layer``; a streaming layer if one of them is."""
    if not isinstance(layer, Steppable) and not isinstance(head, Steppable):
        return Composed(layer, head)
    parts = [part if isinstance(part, Steppable) else PerFrame(part) for part in (layer, head)]
    return Chain(*(each for part in parts for each in (part.layers if isinstance(part, Chain) else (part,))))


def on_clip(layer: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """A block's layer on whole clips (B, T, ...)."""
    if isinstance(layer, Steppable):
        return layer(inputs[0] if len(inputs) == 1 else tuple(inputs))
    return layer(*(x.flatten(0, 1) for x in inputs)).unflatten(0, inputs[0].shape[:2])


def step_of(layer: nn.Module, inputs: tuple[Tensor, ...], state: Any) -> tuple[Tensor, Any]:
    """A block's layer on one frame; ``state`` is None at the start of a stream."""
    if not isinstance(layer, Steppable):
        return layer(*inputs), None
    given: Any = inputs[0] if len(inputs) == 1 else inputs
    return layer.step(given, layer.init_state(given) if state is None else state)


def answer_as_maps(answer: Tensor, like_BCHW: Tensor) -> Tensor:
    """An answer as channels beside maps: probabilities, in their height and width."""
    if answer.ndim == 2:
        maps = answer.softmax(1)[:, :, None, None]
    else:
        maps = (answer - answer.amax((2, 3), keepdim=True)).exp()
    if maps.shape[2:] == (1, 1):
        maps = maps.expand(-1, -1, *like_BCHW.shape[2:])
    elif maps.shape[2:] != like_BCHW.shape[2:]:
        maps = F.interpolate(maps, like_BCHW.shape[2:], mode="bilinear", align_corners=False)
    return maps.expand(like_BCHW.shape[0], -1, -1, -1)


def zero_conv(num_channels: int, num_outputs: int, like: Tensor) -> nn.Conv2d:
    """The columns of a 1 x 1 convolution for channels that are added later."""
    conv = nn.Conv2d(num_channels, num_outputs, 1, bias=False, device=like.device, dtype=like.dtype)
    nn.init.zeros_(conv.weight)
    return conv
