"""Counted operations against counts by hand, and the step form of I3D against its sliding window by arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sidestream.evals.compare_forms import forms_of
from sidestream.evals.flops import clip_flops, count_flops, num_parameters, stream_flops
from sidestream.models.i3d import I3D, TRUNK
from sidestream.nn.attention import TemporalAttention
from sidestream.nn.combine import Chain, PerFrame
from sidestream.nn.conv3d import CausalConv3d
from sidestream.nn.recurrent import GRU, LSTM
from sidestream.nn.sliding import SlidingWindow


def test_linear_and_conv3d_by_hand() -> None:
    assert count_flops(lambda: nn.Linear(7, 5)(torch.rand(3, 7))) == 2 * 3 * 7 * 5
    conv = nn.Conv3d(3, 4, (3, 5, 5), stride=(1, 2, 2), padding=(1, 2, 2), groups=1)
    assert count_flops(lambda: conv(torch.rand(2, 3, 6, 8, 8))) == 2 * (2 * 6 * 4 * 4 * 4) * (3 * 3 * 5 * 5)
    grouped = nn.Conv3d(6, 6, 3, padding=1, groups=6)
    assert count_flops(lambda: grouped(torch.rand(1, 6, 2, 4, 4))) == 2 * (6 * 2 * 4 * 4) * 27


def test_attention_by_hand() -> None:
    rows, heads, tokens, width = 2, 3, 11, 4
    q = torch.rand(rows, heads, tokens, width)
    by_hand = 2 * (2 * rows * heads * tokens * tokens * width)  # q k^T, then weights v
    assert count_flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == by_hand
    few, wide = torch.rand(rows, heads, 5, width), torch.rand(rows, heads, tokens, 6)  # fewer queries, wider values
    assert count_flops(lambda: nn.functional.scaled_dot_product_attention(few, q, wide)) == 2 * (
        rows * heads * 5 * tokens * (width + 6)
    )
    layer, dim = nn.MultiheadAttention(12, 3, batch_first=True).eval(), 12
    x = torch.rand(rows, tokens, dim)
    projections = 2 * rows * tokens * dim * 4 * dim
    scores = 2 * (2 * rows * tokens * tokens * dim)
    assert count_flops(lambda: layer(x, x, x, need_weights=False)) == projections + scores


def test_a_transformer_layer_by_hand() -> None:
    """In evaluation torch runs it as one fused operator, which would count as nothing."""
    layer, tokens, dim, hidden = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True).eval(), 7, 12, 20
    by_hand = 2 * (4 * tokens * dim * dim + 2 * tokens * tokens * dim + 2 * tokens * dim * hidden)
    assert count_flops(lambda: layer(torch.rand(1, tokens, dim))) == by_hand
    assert torch.backends.mha.get_fastpath_enabled()


def test_matrix_times_vector_by_hand() -> None:
    matrix, vector = torch.rand(5, 7), torch.rand(7)
    assert count_flops(lambda: matrix @ vector) == 2 * 5 * 7
    assert count_flops(lambda: torch.addmv(torch.rand(5), matrix, vector)) == 2 * 5 * 7
    assert count_flops(lambda: nn.Linear(7, 5)(vector)) == 2 * 5 * 7


@pytest.mark.parametrize(("kind", "num_gates"), [(LSTM, 4), (GRU, 3)])
def test_recurrent_networks_by_hand(kind: type[LSTM | GRU], num_gates: int) -> None:
    """The LSTM of the CPU is one operator, which torch's counter alone does not see."""
    layer, num_frames = kind(6, 5), 7
    per_frame = 2 * 2 * num_gates * 5 * (6 + 5)  # 2 streams
    assert clip_flops(layer, torch.rand(2, num_frames, 6)) == num_frames * per_frame
    assert stream_flops(layer, torch.rand(2, 6)) == per_frame  # type: ignore[arg-type]


def test_the_step_form_of_a_causal_convolution_costs_a_frame() -> None:
    layer = Chain(CausalConv3d(3, 4, 3, padding=1), CausalConv3d(4, 2, (3, 1, 1), stride=(2, 1, 1)))
    clip_BTCHW = torch.rand(1, 8, 3, 6, 6)
    first, second = 2 * 36 * 4 * 3 * 27, 2 * 36 * 2 * 4 * 3
    assert clip_flops(layer, clip_BTCHW) == 8 * first + 4 * second
    assert stream_flops(layer, clip_BTCHW[:, 0]) == 2 * first + second


def test_the_step_form_of_attention_grows_to_its_window() -> None:
    layer, tokens, dim, window = TemporalAttention(8, 2, window=4), 3, 8, 4
    products = 2 * tokens * dim * 4 * dim
    frame_BND = torch.rand(1, tokens, dim)
    assert stream_flops(layer, frame_BND, num_warm_up=6) == products + 2 * 2 * tokens * window * dim
    assert stream_flops(layer, frame_BND, num_warm_up=0) == products + 2 * 2 * tokens * 1 * dim


def test_a_sliding_window_costs_a_clip_and_a_frame_model_a_frame() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4 * 3 * 2 * 2, 5))
    window = SlidingWindow(net, 4, period_ticks=3)
    assert stream_flops(window, torch.rand(1, 3, 2, 2)) == 2 * 48 * 5
    assert stream_flops(PerFrame(nn.Flatten()), torch.rand(1, 3, 2, 2)) == 0


def test_unused_parameters_count_and_shared_ones_count_once() -> None:
    layer = nn.Linear(3, 4)
    assert num_parameters(nn.Sequential(layer, layer)) == 16


def i3d_flops(net: I3D, num_frames: int, size_px: int) -> int:
    """By hand, from the table of the net: every convolution's outputs times what each reads, twice."""
    total, time, size, channels = 0, num_frames, size_px, 3

    def conv(module: nn.Module) -> int:
        weight: Tensor = module.get_parameter("conv3d.weight")
        return 2 * time * size * size * weight.numel()

    for name, widths, _, stride in TRUNK:
        time, size = math.ceil(time / stride[0]), math.ceil(size / stride[1])
        layer = net.get_submodule(name)
        parts = ("b0", "b1a", "b1b", "b2a", "b2b", "b3b")
        units = [layer] if len(widths) == 1 else [layer.get_submodule(part) for part in parts if widths]
        total += sum(conv(unit) for unit in units)
        channels = channels if not widths else 0
    places = (time - 1) * max(1, size - 6) ** 2
    return total + 2 * places * net.get_parameter("logits.conv3d.weight").numel()


def test_i3d_clip_and_stream_by_hand() -> None:
    """A stream pays for 8 new frames per answer, a window of 64 for all 64: one eighth, as the strides divide."""
    net = I3D(5, width=1 / 8).eval()
    clip_BTCHW = torch.rand(1, 64, 3, 32, 32)
    forms = forms_of(net, num_frames=64, answer_every=8)
    of_clip = clip_flops(net, clip_BTCHW)
    assert of_clip == i3d_flops(net, 64, 32)
    assert stream_flops(forms.window, clip_BTCHW[:, 0]) == of_clip
    of_answer = stream_flops(forms.stream, clip_BTCHW[:, 0])
    head = 2 * net.get_parameter("logits.conv3d.weight").numel()
    assert of_answer == (of_clip - 7 * head) // 8 + head  # a clip of 64 has 7 answers of the head
    assert of_answer <= of_clip / 4
