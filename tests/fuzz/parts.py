"""Modules that random models are built of: ready blocks, some of which keep state or write in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """A skip over two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu_())


class Block(nn.Sequential):
    """Convolution, norm, and an activation in place."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))


class Decay(nn.Module):
    """A running mean, assigned anew in every call."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("h", torch.zeros(shape, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        self.h = 0.5 * self.h + x
        return self.h


class DecayInPlace(Decay):
    """A running mean, kept in place; the answer is the buffer itself."""

    def forward(self, x: Tensor) -> Tensor:
        self.h.mul_(0.5).add_(x)
        return self.h


class Before(Decay):
    """What was given in the call before, copied out."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.h.clone()
        self.h.copy_(x)
        return out


class BeforeByName(Decay):
    """What was given in the call before: the names move, the memory stays."""

    def forward(self, x: Tensor) -> Tensor:
        out, self.h = self.h, x
        return out


class Count(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        return x * (self.n % 3)


class Ring(nn.Module):
    """The mean of the last calls, from a ring of memory."""

    def __init__(self, length: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.length = length
        self.register_buffer("ring", torch.zeros(length, *shape, dtype=dtype))
        self.register_buffer("at", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.ring.index_copy_(0, self.at, x[None])
        self.at.add_(1).remainder_(self.length)
        return self.ring.mean(0) + self.ring.index_select(0, self.at)[0]


class Shift(nn.Module):
    """The first channel comes from the frame before."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(shape, dtype=dtype)[:, :1].clone())

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, :1] = self.kept
        out[:, 1:] = x[:, 1:]
        self.kept = x[:, :1]
        return out


class Cell(nn.Module):
    """A recurrent cell over the last axis, its hidden state a buffer."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(width, width)
        self.register_buffer("h", torch.zeros(rows, width))

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.cell(x, self.h)
        return self.h


class Pair(nn.Module):
    """Two answers: a linear map, and its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x).tanh(), x


class InPlace(nn.Module):
    """Changes what it is given, and answers nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5).add_(0.25)
