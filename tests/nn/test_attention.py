"""Temporal attention against torch's own with an explicit mask; the cache stays within its window."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestream.errors import ModelError
from sidestream.nn.attention import TemporalAttention
from sidestream.nn.steppable import step_through


def clip(*shape: int) -> Tensor:
    return torch.rand(2, 7, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5


def band(window: int | None) -> Tensor:
    """Written out: row t sees the columns t - window + 1 to t."""
    return torch.tensor([[s <= t and (window is None or t - s < window) for s in range(7)] for t in range(7)])


@pytest.mark.parametrize("window", [None, 1, 3, 7, 20])
def test_steps_equal_torch_multi_head_attention(window: int | None) -> None:
    layer = TemporalAttention(6, 3, window=window).double()
    oracle = nn.MultiheadAttention(6, 3, batch_first=True).double()
    with torch.no_grad():
        for ours, theirs in (
            (layer.qkv.weight, oracle.in_proj_weight), (layer.qkv.bias, oracle.in_proj_bias),
            (layer.proj.weight, oracle.out_proj.weight), (layer.proj.bias, oracle.out_proj.bias),
        ):  # fmt: skip
            theirs.copy_(ours.normal_())
    expected, _ = oracle(clip(6), clip(6), clip(6), attn_mask=~band(window), need_weights=False)
    torch.testing.assert_close(step_through(layer, clip(6))[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 2])
def test_tokens_never_meet_and_equal_scaled_dot_products(window: int | None) -> None:
    layer = TemporalAttention(4, 2, window=window).double()
    answers = layer(clip(3, 4))
    for token in range(3):
        q, k, v = layer.qkv(clip(3, 4)[:, :, token]).reshape(2, 7, 3, 2, 2).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=band(window))
        expected = layer.proj(seen.permute(0, 2, 1, 3).reshape(2, 7, 4))
        torch.testing.assert_close(answers[:, :, token], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("window", "kept"), [(None, 7), (1, 0), (3, 2), (20, 7)])
def test_the_cache_is_bounded_by_the_window(window: int | None, kept: int) -> None:
    keys, values = step_through(TemporalAttention(4, 2, window=window).double(), clip(3, 4))[1]
    assert keys.shape == values.shape == (2 * 3, 2, kept, 2)


def test_wrong_requests() -> None:
    with pytest.raises(ModelError, match="dim = 6 cannot be shared out among num_heads = 4"):
        TemporalAttention(6, 4)
    with pytest.raises(ModelError, match="window = 0 frames would see nothing"):
        TemporalAttention(4, 2, window=0)
