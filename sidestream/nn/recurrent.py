"""Recurrent layers on streams: LSTM and GRU over features, ConvLSTM and ConvGRU over maps."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.errors import ModelError
from sidestream.nn.steppable import Steppable


class _Recurrent(Steppable):
    """One of torch's recurrent networks, over clip_BTD; its parameters are under ``rnn`` with torch's names."""

    rnn: nn.LSTM | nn.GRU

    def step(self, frame_BD: Tensor, state: Any) -> tuple[Tensor, Any]:
        answer_B1D, state = self.rnn(frame_BD.unsqueeze(1), state)
        return answer_B1D.squeeze(1).clone(), state

    def forward(self, clip_BTD: Tensor) -> Tensor:
        return self.rnn(clip_BTD)[0]

    def _zeros_LBD(self, frame_BD: Tensor) -> Tensor:
        return frame_BD.new_zeros(self.rnn.num_layers, frame_BD.shape[0], self.rnn.hidden_size)


class LSTM(_Recurrent):
    """torch.nn.LSTM, (B, T, input_size) -> (B, T, hidden_size). State: (hidden_LBD, cell_LBD), L layers."""

    def __init__(self, input_size: int, hidden_size: int, *, num_layers: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.rnn = nn.LSTM(input_size, hidden_size, num_layers, bias, batch_first=True)

    def init_state(self, frame_BD: Tensor) -> tuple[Tensor, Tensor]:
        return self._zeros_LBD(frame_BD), self._zeros_LBD(frame_BD)


class GRU(_Recurrent):
    """torch.nn.GRU, (B, T, input_size) -> (B, T, hidden_size). State: hidden_LBD, L layers."""

    def __init__(self, input_size: int, hidden_size: int, *, num_layers: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.rnn = nn.GRU(input_size, hidden_size, num_layers, bias, batch_first=True)

    def init_state(self, frame_BD: Tensor) -> Tensor:
        return self._zeros_LBD(frame_BD)


class _ConvRecurrent(Steppable):
    """Recurrent over maps: the part of the gates that reads the frame is made for all frames of a clip at once."""

    def __init__(self, in_channels: int, hidden_channels: int, kernel_size: int, num_gates: int) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ModelError(f"{kernel_size = } would change the size of the map; give an odd one")
        self.hidden_channels = hidden_channels
        padding = kernel_size // 2
        self.from_frame = nn.Conv2d(in_channels, num_gates * hidden_channels, kernel_size, padding=padding)

    def step(self, frame_BCHW: Tensor, state: Any) -> tuple[Tensor, Any]:
        state = self._advance(self.from_frame(frame_BCHW), state)
        return self._hidden(state).clone(), state

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        gates_BTCHW = self.from_frame(clip_BTCHW.flatten(0, 1)).unflatten(0, clip_BTCHW.shape[:2])
        state, answers = self.init_state(clip_BTCHW[:, 0]), []
        for gates_BCHW in gates_BTCHW.unbind(1):
            state = self._advance(gates_BCHW, state)
            answers.append(self._hidden(state))
        return torch.stack(answers, dim=1)

    @abstractmethod
    def _advance(self, gates_BCHW: Tensor, state: Any) -> Any:
        """The next state, from the part of the gates that reads the frame."""

    def _hidden(self, state: Any) -> Tensor:
        return state

    def _zeros(self, frame_BCHW: Tensor) -> Tensor:
        return frame_BCHW.new_zeros(frame_BCHW.shape[0], self.hidden_channels, *frame_BCHW.shape[2:])


class ConvLSTM(_ConvRecurrent):
    """Convolutional LSTM, Shi et al. (NeurIPS 2015), equation 3; (B, T, C, H, W) -> (B, T, hidden, H, W).

    Differs from the paper: no peephole weights (the terms with a circle in equation 3). Gates in the order input,
    forget, cell, output, as in torch.nn.LSTM. State: (hidden_BCHW, cell_BCHW).
    """

    def __init__(self, in_channels: int, hidden_channels: int, *, kernel_size: int = 3) -> None:
        super().__init__(in_channels, hidden_channels, kernel_size, num_gates=4)
        self.from_hidden = nn.Conv2d(
            hidden_channels, 4 * hidden_channels, kernel_size, padding=kernel_size // 2, bias=False
        )

    def init_state(self, frame_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        return self._zeros(frame_BCHW), self._zeros(frame_BCHW)

    def _advance(self, gates_BCHW: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hidden_BCHW, cell_BCHW = state
        i, f, g, o = (gates_BCHW + self.from_hidden(hidden_BCHW)).chunk(4, dim=1)
        cell_BCHW = f.sigmoid() * cell_BCHW + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell_BCHW.tanh(), cell_BCHW

    def _hidden(self, state: tuple[Tensor, Tensor]) -> Tensor:
        return state[0]


class ConvGRU(_ConvRecurrent):
    """Convolutional GRU, Ballas et al. (ICLR 2016), equations 6 to 9; (B, T, C, H, W) -> (B, T, hidden, H, W).

    The reset gate works on the hidden map before it is convolved (torch.nn.GRU: after). Gates in the order update,
    reset, candidate. State: hidden_BCHW.
    """

    def __init__(self, in_channels: int, hidden_channels: int, *, kernel_size: int = 3) -> None:
        super().__init__(in_channels, hidden_channels, kernel_size, num_gates=3)
        padding = kernel_size // 2
        self.from_hidden = nn.Conv2d(hidden_channels, 2 * hidden_channels, kernel_size, padding=padding, bias=False)
        self.from_reset = nn.Conv2d(hidden_channels, hidden_channels, kernel_size, padding=padding, bias=False)

    def init_state(self, frame_BCHW: Tensor) -> Tensor:
        return self._zeros(frame_BCHW)

    def _advance(self, gates_BCHW: Tensor, hidden_BCHW: Tensor) -> Tensor:
        z, r, candidate = gates_BCHW.chunk(3, dim=1)
        more_z, more_r = self.from_hidden(hidden_BCHW).chunk(2, dim=1)
        z, r = (z + more_z).sigmoid(), (r + more_r).sigmoid()
        candidate = (candidate + self.from_reset(r * hidden_BCHW)).tanh()
        return (1 - z) * hidden_BCHW + z * candidate
