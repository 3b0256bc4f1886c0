"""Temporal self-attention on streams: each place attends to its own past, through a cache of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestream.errors import ModelError
from sidestream.nn.steppable import Steppable


class TemporalAttention(Steppable):
    """Causal multi-head self-attention over time, for each token of a frame apart.

    Frames: (B, ..., D), any axes between, so tokens_BND or one vector per frame; clips: (B, T, ..., D). Each answer
    sees the newest ``window`` frames, itself included; None: all so far (the cache then grows with the stream).
    A frame that holds NaN or infinities gives NaN to the answers that see it, and to no other.

    State: (keys, values), both (B * tokens, num_heads, frames kept, D / num_heads), at most ``window`` - 1 frames.
    """

    def __init__(self, dim: int, num_heads: int, *, window: int | None = None, bias: bool = True) -> None:
        super().__init__()
        if dim % num_heads != 0:
            raise ModelError(f"{dim = } cannot be shared out among {num_heads = }; give a multiple")
        if window is not None and window < 1:
            raise ModelError(f"{window = } frames would see nothing; give 1 or more, or None for all frames so far")
        self.num_heads, self.window = num_heads, window
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)

    def init_state(self, frame_BXD: Tensor) -> tuple[Tensor, Tensor]:
        num_rows, width = frame_BXD[..., 0].numel(), frame_BXD.shape[-1] // self.num_heads
        empty = frame_BXD.new_zeros(num_rows, self.num_heads, 0, width)
        return empty, empty

    def step(self, frame_BXD: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        rows_R1D = frame_BXD.reshape(-1, 1, frame_BXD.shape[-1])
        q, k, v = self._heads(rows_R1D)
        keys, values = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
        answer_R1D = self._merge(F.scaled_dot_product_attention(q, keys, values))
        num_dropped = 0 if self.window is None else max(0, keys.shape[2] - (self.window - 1))
        return answer_R1D.reshape(frame_BXD.shape), (keys[:, :, num_dropped:], values[:, :, num_dropped:])

    def forward(self, clip_BTXD: Tensor) -> Tensor:
        moved_BXTD = clip_BTXD.movedim(1, -2)
        rows_RTD = moved_BXTD.reshape(-1, *moved_BXTD.shape[-2:])
        is_bad_RT = ~rows_RTD.isfinite().all(-1)  # 0 * NaN is NaN, so a masked frame would still be felt
        rows_RTD = rows_RTD.masked_fill(is_bad_RT[..., None], 0.0)
        sees_TT = self._mask(rows_RTD.shape[1], rows_RTD.device)
        q, k, v = self._heads(rows_RTD)
        answer_RTD = self._merge(F.scaled_dot_product_attention(q, k, v, attn_mask=sees_TT))
        sees_bad_RT = (is_bad_RT[:, None, :] & sees_TT).any(-1)
        answer_RTD = answer_RTD.masked_fill(sees_bad_RT[..., None], float("nan"))
        return answer_RTD.reshape(moved_BXTD.shape).movedim(-2, 1)

    def _mask(self, num_frames: int, device: torch.device) -> Tensor:
        """True where the answer of a row's frame sees a column's frame."""
        t = torch.arange(num_frames, device=device)
        age_TT = t[:, None] - t
        return (age_TT >= 0) if self.window is None else (age_TT >= 0) & (age_TT < self.window)

    def _heads(self, rows_RTD: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each (R, num_heads, T, D / num_heads)."""
        parts = self.qkv(rows_RTD).chunk(3, dim=-1)
        return tuple(part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)

    def _merge(self, heads: Tensor) -> Tensor:
        return self.proj(heads.transpose(1, 2).flatten(2))
