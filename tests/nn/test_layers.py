"""Every streaming layer keeps the contract: one line per configuration. Numbers: the test_*.py of each family."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract import check_streaming_layer
from sidestream.nn.attention import TemporalAttention
from sidestream.nn.combine import Chain, Parallel, PerFrame, Residual
from sidestream.nn.conv3d import CausalConv3d, Conv3d
from sidestream.nn.convert import lift, to_streaming
from sidestream.nn.pool import AvgPool3d, MaxPool3d, Newest, RunningMean
from sidestream.nn.recurrent import GRU, LSTM, ConvGRU, ConvLSTM
from sidestream.nn.shift import OnlineShift, TemporalShift
from sidestream.nn.steppable import Steppable

ALL = math.inf
MAP, VECTOR, TOKENS = (4, 4, 4), (4,), (3, 4)


def same(kernel: int = 3) -> Conv3d:
    return Conv3d(4, 4, kernel, padding=kernel // 2)


# layer, shape of a frame, is it causal, receptive field in frames (or ages)
LAYERS: list[tuple[str, Any, tuple[int, ...], bool, Any]] = [
    ("causal conv", lambda: CausalConv3d(4, 3, 3, padding=1), MAP, True, 3),
    ("causal conv, kernel 1", lambda: CausalConv3d(4, 3, (1, 3, 3)), MAP, True, 1),
    ("causal conv, kernel 1, stride 2", lambda: CausalConv3d(4, 3, 1, stride=2), MAP, True, 1),
    ("causal conv, stride 2", lambda: CausalConv3d(4, 3, (3, 3, 2), stride=(2, 2, 1), padding=1), MAP, True, 3),
    ("causal conv, stride 3", lambda: CausalConv3d(4, 2, (2, 1, 1), stride=(3, 1, 1)), MAP, True, 2),
    ("causal conv, dilation 2", lambda: CausalConv3d(4, 2, 2, dilation=2, bias=False), MAP, True, [0, 2]),
    ("causal conv, groups", lambda: CausalConv3d(4, 4, 3, groups=2, padding=(1, 0)), MAP, True, 3),
    ("causal conv, all",
     lambda: CausalConv3d(4, 4, 3, stride=2, padding=2, dilation=2, groups=4), MAP, True, [0, 2, 4]),
    ("conv", lambda: Conv3d(4, 3, 3, padding=1), MAP, False, 3),
    ("conv, kernel 5", lambda: Conv3d(4, 3, (5, 1, 1), padding=(2, 0, 0)), MAP, False, 5),
    ("conv, no padding", lambda: Conv3d(4, 3, 3), MAP, False, 3),
    ("conv, stride 2", lambda: Conv3d(4, 3, 3, stride=2, padding=1), MAP, False, 3),
    ("conv, stride 2, kernel 4", lambda: Conv3d(4, 3, (4, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0)), MAP, False, 4),
    ("conv, dilation 2", lambda: Conv3d(4, 2, (3, 1, 1), dilation=2, padding=(2, 0, 0)), MAP, False, [0, 2, 4]),
    ("conv, uneven ends", lambda: Conv3d(4, 2, (4, 1, 1), stride=(2, 1, 1), time_padding=(0, 2)), MAP, False, 4),
    ("conv, all before", lambda: Conv3d(4, 2, (3, 1, 1), time_padding=(2, 0)), MAP, True, 3),
    ("max pool", lambda: MaxPool3d(3, stride=1, padding=1), MAP, False, 3),
    ("max pool, stride 2", lambda: MaxPool3d(2), MAP, False, 2),
    ("max pool, stride 2, padded", lambda: MaxPool3d(3, stride=2, padding=1), MAP, False, 3),
    ("max pool, causal", lambda: MaxPool3d((3, 1, 1), stride=1, is_causal=True), MAP, True, 3),
    ("max pool, causal, stride 2", lambda: MaxPool3d((2, 2, 2), is_causal=True), MAP, True, 2),
    ("max pool, space", lambda: MaxPool3d((1, 2, 2)), MAP, True, 1),
    ("average pool", lambda: AvgPool3d(3, stride=1, padding=1), MAP, False, 3),
    ("average pool, causal, stride 2", lambda: AvgPool3d((4, 1, 1), stride=(2, 1, 1), is_causal=True), MAP, True, 4),
    ("average pool, uneven ends", lambda: AvgPool3d((4, 2, 2), stride=2, time_padding=(1, 2)), MAP, False, 4),
    ("running mean", RunningMean, MAP, True, ALL),
    ("running mean of vectors", RunningMean, VECTOR, True, ALL),
    ("newest", Newest, MAP, True, 1),
    ("newest of three", lambda: Newest(3), VECTOR, True, 1),
    ("online shift", lambda: OnlineShift(0.25), MAP, True, 2),
    ("shift", lambda: TemporalShift(4), MAP, False, 3),
    ("LSTM", lambda: LSTM(4, 5), VECTOR, True, ALL),
    ("LSTM, two layers", lambda: LSTM(4, 3, num_layers=2, bias=False), VECTOR, True, ALL),
    ("GRU", lambda: GRU(4, 5), VECTOR, True, ALL),
    ("GRU, two layers", lambda: GRU(4, 3, num_layers=2), VECTOR, True, ALL),
    ("ConvLSTM", lambda: ConvLSTM(4, 3), MAP, True, ALL),
    ("ConvLSTM, kernel 1", lambda: ConvLSTM(4, 2, kernel_size=1), MAP, True, ALL),
    ("ConvGRU", lambda: ConvGRU(4, 3), MAP, True, ALL),
    ("attention", lambda: TemporalAttention(4, 2), VECTOR, True, ALL),
    ("attention over tokens", lambda: TemporalAttention(4, 2), TOKENS, True, ALL),
    ("attention, window 3", lambda: TemporalAttention(4, 2, window=3), TOKENS, True, 3),
    ("attention, window 1", lambda: TemporalAttention(4, 1, window=1, bias=False), VECTOR, True, 1),
    ("chain of strides",
     lambda: Chain(CausalConv3d(4, 4, 3, stride=2, padding=1), CausalConv3d(4, 2, 2)), MAP, True, 5),
    ("chain of delays", lambda: Chain(same(), PerFrame(nn.Tanh()), same()), MAP, False, 5),
    ("chain of both", lambda: Chain(MaxPool3d(2), same(), Newest(2)), MAP, False, 6),
    ("chain in chain", lambda: Chain(Chain(TemporalShift(4)), Chain(same(), RunningMean())), MAP, False, ALL),
    ("chain, delay behind stride", lambda: Chain(Conv3d(4, 4, 3, stride=2, padding=1), same()), MAP, False, 7),
    ("residual", lambda: Residual(CausalConv3d(4, 4, 3, padding=1)), MAP, True, 3),
    ("residual, delayed skip", lambda: Residual(Chain(same(), same(5))), MAP, False, 7),
    ("residual, strided skip", lambda: Residual(Conv3d(4, 4, 3, stride=2, padding=1), MaxPool3d((1, 2, 2), stride=2)),
     MAP, False, 3),
    ("residual in residual", lambda: Residual(Chain(Residual(same()), same())), MAP, False, 5),
    ("parallel", lambda: Parallel(same(), same(5), Newest(), combine="concat"), MAP, False, 5),
    ("parallel sum, strided", lambda: Parallel(Newest(2), Conv3d(4, 4, 3, stride=(2, 1, 1), padding=1)), MAP, False, 3),
    ("parallel of one", lambda: Parallel(OnlineShift(0.5)), MAP, True, 2),
    ("batch norm", lambda: lift(nn.BatchNorm3d(4)), MAP, True, 1),
    ("layer norm", lambda: lift(nn.LayerNorm(4)), MAP, True, 1),
    ("linear", lambda: lift(nn.Linear(4, 3)), MAP, True, 1),
    ("linear over tokens", lambda: lift(nn.Linear(4, 3)), TOKENS, True, 1),
    ("converted", lambda: to_streaming(network()), MAP, False, 6),
    ("converted, causal", lambda: to_streaming(network(), is_causal=True), MAP, True, 6),
]  # fmt: skip


def network() -> nn.Sequential:
    """kernel 3, then a pool of 2 with stride 2, then kernel 2: sees 3 + 1 + 2 frames."""
    start = nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(inplace=True))
    return nn.Sequential(start, nn.MaxPool3d(2), nn.Conv3d(4, 3, (2, 1, 1)), nn.AvgPool3d((1, 2, 2))).double().eval()


def make(build: Any) -> Steppable:
    torch.manual_seed(0)
    layer = build().double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-0.7, 0.7)  # also where torch starts with zeros or ones
    return layer


def clip(shape: tuple[int, ...], num_frames: int, num_streams: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(num_streams, num_frames, *shape, generator=generator, dtype=torch.float64) - 0.5


@pytest.mark.parametrize("num_frames", [7, 8])
@pytest.mark.parametrize(("build", "shape", "is_causal", "field"), [pytest.param(*c[1:], id=c[0]) for c in LAYERS])
def test_contract(build: Any, shape: tuple[int, ...], is_causal: bool, field: Any, num_frames: int) -> None:
    check_streaming_layer(make(build), clip(shape, num_frames), is_causal=is_causal, receptive_field=field)
