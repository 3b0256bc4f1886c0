"""Recurrent layers against torch's own with the same weights, its cells, and cells written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestream.errors import ModelError
from sidestream.nn.recurrent import GRU, LSTM, ConvGRU, ConvLSTM
from sidestream.nn.steppable import step_through


def clip(*shape: int) -> Tensor:
    return torch.rand(2, 6, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_steps_equal_torch(num_layers: int, bias: bool) -> None:
    for ours, torchs in ((LSTM, nn.LSTM), (GRU, nn.GRU)):
        layer = ours(4, 5, num_layers=num_layers, bias=bias).double()
        oracle = torchs(4, 5, num_layers, bias=bias, batch_first=True).double()
        oracle.load_state_dict(layer.rnn.state_dict(), strict=True)
        expected, last = oracle(clip(4))
        answers, state = step_through(layer, clip(4))
        torch.testing.assert_close(answers, expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(state, last, rtol=0, atol=1e-13)


def test_the_clip_form_equals_torchs_cells() -> None:
    for ours, cell in ((LSTM, nn.LSTMCell(4, 5)), (GRU, nn.GRUCell(4, 5))):
        layer = ours(4, 5).double()
        cell = cell.double()
        cell.load_state_dict({name.removesuffix("_l0"): w for name, w in layer.rnn.state_dict().items()}, strict=True)
        state, expected = None, []
        for frame in clip(4).unbind(1):
            state = cell(frame, state)
            expected.append(state[0] if isinstance(state, tuple) else state)
        torch.testing.assert_close(layer(clip(4)), torch.stack(expected, 1), rtol=0, atol=1e-13)


def conv(frame: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(frame, weight, bias, padding=1)


def test_conv_lstm_written_out() -> None:
    layer = ConvLSTM(4, 3).double()
    weight = torch.cat([layer.from_frame.weight, layer.from_hidden.weight], dim=1)  # one convolution of both
    hidden = cell = torch.zeros(2, 3, 5, 4, dtype=torch.float64)
    for frame, answer in zip(clip(4, 5, 4).unbind(1), layer(clip(4, 5, 4)).unbind(1), strict=True):
        gates = conv(torch.cat([frame, hidden], dim=1), weight, layer.from_frame.bias)
        i, f, g, o = gates[:, :3], gates[:, 3:6], gates[:, 6:9], gates[:, 9:]
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
        torch.testing.assert_close(answer, hidden, rtol=0, atol=1e-13)


def test_conv_gru_written_out() -> None:
    layer = ConvGRU(4, 3).double()
    w, b, u = layer.from_frame.weight, layer.from_frame.bias, layer.from_hidden.weight
    assert b is not None
    hidden = torch.zeros(2, 3, 5, 4, dtype=torch.float64)
    for frame, answer in zip(clip(4, 5, 4).unbind(1), layer(clip(4, 5, 4)).unbind(1), strict=True):
        update = torch.sigmoid(conv(frame, w[:3], b[:3]) + conv(hidden, u[:3]))
        reset = torch.sigmoid(conv(frame, w[3:6], b[3:6]) + conv(hidden, u[3:]))
        new = torch.tanh(conv(frame, w[6:], b[6:]) + conv(reset * hidden, layer.from_reset.weight))
        hidden = hidden + update * (new - hidden)
        torch.testing.assert_close(answer, hidden, rtol=0, atol=1e-13)


def test_a_conv_lstm_of_one_pixel_is_an_lstm() -> None:
    layer, lstm = ConvLSTM(4, 3, kernel_size=1).double(), nn.LSTM(4, 3, batch_first=True).double()
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(layer.from_frame.weight.flatten(1))
        lstm.weight_hh_l0.copy_(layer.from_hidden.weight.flatten(1))
        lstm.bias_ih_l0.copy_(layer.from_frame.bias)
        lstm.bias_hh_l0.zero_()
    answers = layer(clip(4)[..., None, None]).flatten(2)
    torch.testing.assert_close(answers, lstm(clip(4))[0], rtol=0, atol=1e-13)


def test_even_kernels_are_refused() -> None:
    with pytest.raises(ModelError, match="kernel_size = 2 would change the size"):
        ConvGRU(3, 4, kernel_size=2)
