"""TimeSformer on streams: divided attention that looks back only, with a cache of keys and values in every block.

Differs from "divided" (``timesformer``), whose weights it takes: a patch attends to the newest ``num_frames`` frames
at its place, itself included; every frame has its own class token, not averaged over the clip; the time embedding is
used in turn (frame t has entry t modulo its length), so that streams have no end: no two frames that an attention
sees share an entry.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sidestream.errors import LayoutError
from sidestream.models.clip_layout import ClipForm, as_stream_of, check_clip
from sidestream.models.timesformer import TimeSformer
from sidestream.models.timesformer_blocks import Attention, Block
from sidestream.models.timesformer_embedding import Embedding, Size
from sidestream.nn.attention import TemporalAttention
from sidestream.nn.combine import Chain, PerFrame
from sidestream.nn.steppable import Steppable


class CausalTimeSformer(nn.Module):
    """Causal divided attention: ``clip_BTCHW`` -> logits (B, num_classes) of the last frame.

    ``answers`` has the logits of all frames. Any number of frames from one on; height and width as in ``TimeSformer``.
    Raises ``LayoutError`` for other axes and sizes.
    """

    classifier = "net.head"

    def __init__(self, num_classes: int = 400, *, size: Size | None = None) -> None:
        super().__init__()
        self.net = TimeSformer(num_classes, scheme="divided", size=size)
        self.num_features, self.stride_px = self.net.num_features, self.net.stride_px
        self._clip_form = ClipForm(self.net, self._chains)

    @property
    def weights_target(self) -> nn.Module:
        """The net whose keys a weights file has: those of "divided"."""
        return self.net

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self.answers(clip_BTCHW)[:, -1]

    def answers(self, clip_BTCHW: Tensor) -> Tensor:
        """Logits of every frame (B, T, num_classes), each from the frames up to it: the clip form of ``streaming``."""
        check_clip("TimeSformer", clip_BTCHW)
        return self._clip_form()[0](clip_BTCHW)

    def features(self, clip_BTCHW: Tensor) -> Tensor:
        """Maps of every frame after the last norm, without the class token: (B, T, D, H / patch, W / patch)."""
        check_clip("TimeSformer", clip_BTCHW)
        tokens_BTND = clip_BTCHW
        for layer in self._clip_form()[0].layers[:-1]:
            tokens_BTND = layer(tokens_BTND)
        height, width = (side // self.stride_px for side in clip_BTCHW.shape[-2:])
        return self.net.norm(tokens_BTND[:, :, 1:]).unflatten(2, (height, width)).movedim(-1, 2)

    def streaming_features(self) -> Chain:
        """``features`` on a stream, for square frames (others: ``LayoutError``)."""
        return as_stream_of(self, Chain(*self._chain().layers[:-1], PerFrame(SquareMaps(self.net.norm))))

    def streaming(self) -> Chain:
        """The net on a stream, its parameters shared: logits (B, num_classes) of every frame, at once."""
        return as_stream_of(self, self._chain())

    def _chains(self) -> tuple[Chain]:
        return (self._chain(),)

    def _chain(self) -> Chain:
        window = self.net.size.num_frames
        blocks = (CausalBlock(block, window=window) for block in self.net.blocks)  # type: ignore[arg-type]
        return Chain(FrameTokens(self.net.embedding), *blocks, PerFrame(Answer(self.net.norm, self.net.head)))


class FrameTokens(Steppable):
    """frame_BCHW -> tokens (B, 1 + H * W, D), the class token first, then the patches row by row.

    State: which entry of the embedding of times is next, as a tensor of one number (so that a graph can count it).
    """

    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def init_state(self, frame_BCHW: Tensor) -> Tensor:
        return torch.zeros(1, dtype=torch.int64, device=frame_BCHW.device)

    def step(self, frame_BCHW: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        times_TD = self.embedding.times_1TD[0]
        tokens_BTND = self._tokens(frame_BCHW.unsqueeze(1), times_TD.index_select(0, state))
        return tokens_BTND[:, 0], (state + 1) % len(times_TD)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        times_TD = self.embedding.times_1TD[0]
        return self._tokens(clip_BTCHW, times_TD[torch.arange(clip_BTCHW.shape[1]) % len(times_TD)])

    def _tokens(self, clip_BTCHW: Tensor, times_TD: Tensor) -> Tensor:
        class_BTD, patches_BTHWD = self.embedding(clip_BTCHW)
        return _joined(class_BTD, patches_BTHWD + times_TD[:, None, None])


class CausalBlock(Steppable):
    """A block of divided attention on tokens (B, 1 + N, D) of one frame; parameters shared with ``block``.

    State: that of ``TemporalAttention``, keys and values of the newest ``window`` - 1 frames at each place.
    """

    def __init__(self, block: Block, *, window: int) -> None:
        super().__init__()
        self.block = block
        time = block.steps[0]
        self.attention = _with_cache(time.attention, window)  # type: ignore[arg-type]

    def init_state(self, frame_BND: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention.init_state(frame_BND[:, 1:])

    def step(self, frame_BND: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        seen_BND, state = self.attention.step(self._normed(frame_BND[:, 1:]), state)
        return self._rest(frame_BND.unsqueeze(1), seen_BND.unsqueeze(1))[:, 0], state

    def forward(self, clip_BTND: Tensor) -> Tensor:
        return self._rest(clip_BTND, self.attention(self._normed(clip_BTND[:, :, 1:])))

    def _normed(self, patches: Tensor) -> Tensor:
        return self.block.steps[0].norm(patches)  # type: ignore[operator,union-attr]

    def _rest(self, tokens_BTND: Tensor, seen_BTND: Tensor) -> Tensor:
        """What follows the time attention, in each frame apart; ``seen_BTND``: what that attention answered."""
        time, space = self.block.steps
        patches_BTND = tokens_BTND[:, :, 1:] + time.mix(seen_BTND)  # type: ignore[operator]
        class_BTD, patches_BT1ND = self.block.end(space, tokens_BTND[:, :, 0], patches_BTND.unsqueeze(2))
        return _joined(class_BTD, patches_BT1ND)


class Answer(nn.Module):
    """Tokens of a frame (B, 1 + N, D) -> logits, from the class token."""

    def __init__(self, norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, tokens_BND: Tensor) -> Tensor:
        return self.head(self.norm(tokens_BND[:, 0]))


class SquareMaps(nn.Module):
    """Tokens of a square frame (B, 1 + N, D) -> maps (B, D, H, W), without the class token."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, tokens_BND: Tensor) -> Tensor:
        num_patches = tokens_BND.shape[1] - 1
        side = math.isqrt(num_patches)
        if side**2 != num_patches:
            raise LayoutError(f"{num_patches} patches do not make a square; give frames as high as they are wide")
        return self.norm(tokens_BND[:, 1:]).transpose(1, 2).unflatten(2, (side, side))


def _joined(class_BTD: Tensor, patches_BTHWD: Tensor) -> Tensor:
    """Tokens (B, T, 1 + H * W, D)."""
    return torch.cat([class_BTD.unsqueeze(2), patches_BTHWD.flatten(2, 3)], dim=2)


def _with_cache(attention: Attention, window: int) -> TemporalAttention:
    """The streaming layer with the parameters of ``attention``."""
    with torch.device("meta"):  # its own parameters are dropped at once
        layer = TemporalAttention(attention.qkv.in_features, attention.num_heads, window=window)
    layer.qkv, layer.proj = attention.qkv, attention.proj
    return layer
