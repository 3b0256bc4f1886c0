"""Clip models of the tests' own: ordinary ones that have an exact step form, and ones that have none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Everything(nn.Module):
    """Branches, strides, dilation, pads before and after, a shift by slices, a concatenation, a mean at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, (5, 3, 3), stride=(1, 2, 2), padding=(2, 1, 1))
        self.norm = nn.BatchNorm3d(8)
        self.wide = nn.Conv3d(8, 8, (3, 1, 1), padding=(2, 0, 0), dilation=(2, 1, 1), groups=2)
        self.narrow = nn.Conv3d(8, 4, 1)
        self.pool = nn.MaxPool3d((3, 1, 1), stride=1, padding=(1, 0, 0))
        self.down = nn.Conv3d(12, 8, 3, stride=(2, 1, 1), padding=1)
        self.skip = nn.Conv3d(12, 8, 1, stride=(2, 1, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(clip_BTCHW.transpose(1, 2))))
        x = torch.cat([x[:, :2].roll(1, dims=1), x[:, 2:]], dim=1)
        later, earlier = F.pad(x[:, :4, 1:], (0, 0, 0, 0, 0, 1)), F.pad(x[:, 4:, :-1], (0, 0, 0, 0, 1, 0))
        x = x + torch.cat([later, earlier], dim=1)
        x = torch.cat([self.wide(x), self.pool(self.narrow(x))], dim=1)
        x = torch.relu(self.down(x) + self.skip(x))
        return self.head(x.mean((2, 3, 4)))


class Causal(nn.Module):
    """Padded in front only; an answer per frame."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv3d(3, 4, 3, padding=(0, 1, 1))
        self.b = nn.Conv3d(4, 4, (3, 1, 1), dilation=(2, 1, 1))
        self.c = nn.Conv3d(4, 6, (2, 3, 3))

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        x = clip_BTCHW.transpose(1, 2)
        x = torch.relu(self.a(F.pad(x, (0, 0, 0, 0, 2, 0))))
        x = x + self.b(F.pad(x, (0, 0, 0, 0, 4, 0)))
        return self.c(F.pad(x, (0, 0, 0, 0, 1, 0))).mean((3, 4)).transpose(1, 2)


class ShiftInPlace(nn.Module):
    """The shift of TSM as its authors write it: into a tensor of zeros; frames folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        streams, frames, _, height, width = clip_BTCHW.shape
        x = self.a(clip_BTCHW.flatten(0, 1)).view(streams, frames, 8, height, width)
        out = torch.zeros_like(x)
        out[:, :-1, :2] = x[:, 1:, :2]
        out[:, 1:, 2:4] = x[:, :-1, 2:4]
        out[:, :, 4:] = x[:, :, 4:]
        x = torch.relu(self.b(out.view(streams * frames, 8, height, width)))
        return self.head(x.mean((2, 3))).view(streams, frames, 4).mean(1)


class Recurrent(nn.Module):
    """A frame encoder and a recurrent layer; the last output counts."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, *, last: str = "output") -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.recur = kind(6, 5, num_layers=2, batch_first=True)
        self.head, self.last = nn.Linear(5, 3), last

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        x = self.encode(clip_BTCHW.flatten(0, 1)).unflatten(0, clip_BTCHW.shape[:2])
        out, state = self.recur(x)
        hidden = state[0] if isinstance(state, tuple) else state
        return self.head(out[:, -1] if self.last == "output" else hidden[-1])


class OverTime1d(nn.Module):
    """Features of each frame, then convolutions over time alone, and the first frame repeated in front."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv2d(3, 6, 3, stride=2)
        self.time = nn.Conv1d(6, 6, 3, padding="same")
        self.more = nn.Conv1d(6, 6, 3)
        self.pool = nn.AvgPool1d(2, stride=2)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        streams, frames = clip_BTCHW.shape[:2]
        x = self.encode(clip_BTCHW.reshape(-1, *clip_BTCHW.shape[2:])).mean((2, 3)).view(streams, frames, -1)
        x = F.gelu(self.time(x.transpose(1, 2)))
        x = self.more(torch.cat([x[:, :, :1], x[:, :, :1], x], dim=2))
        return self.pool(x).transpose(1, 2)


class Differences(nn.Module):
    """Motion by differences of frames, with replicated ends, beside the frames themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.see, self.move = nn.Conv2d(3, 4, 3, padding=1), nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        x = clip_BTCHW.transpose(1, 2)
        ends = F.pad(x, (0, 0, 0, 0, 1, 1), mode="replicate")
        motion = self.move(ends[:, :, 2:] - ends[:, :, :-2])
        seen = self.see(clip_BTCHW.flatten(0, 1)).unflatten(0, clip_BTCHW.shape[:2]).transpose(1, 2)
        return torch.relu(seen + motion).amax((3, 4)).amax(2)


class LayerNormed(nn.Module):
    """Attention inside of each frame, a class token per frame, a mean over frames."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.head = nn.Linear(16, 3)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        streams, frames = clip_BTCHW.shape[:2]
        x = self.embed(clip_BTCHW.flatten(0, 1)).flatten(2).transpose(1, 2)
        x = self.block(torch.cat([self.token.expand(len(x), -1, -1), x], dim=1))
        return self.head(x[:, 0]).view(streams, frames, -1).mean(1)


class TwoRates(nn.Module):
    """A slow and a fast branch, each pooled over all of its time, and joined."""

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.fast = nn.Conv3d(3, 4, 3, padding=1), nn.Conv3d(3, 2, (5, 3, 3), padding=(2, 1, 1))
        self.head = nn.Linear(6, 3)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        x = clip_BTCHW.transpose(1, 2)
        pooled = [F.adaptive_avg_pool3d(m, 1).flatten(1) for m in (self.slow(x[:, :, ::4]).relu(), self.fast(x).relu())]
        return self.head(torch.cat(pooled, dim=1))


NETS: dict[str, Any] = {
    "everything": Everything,
    "causal": Causal,
    "shift in place": ShiftInPlace,
    "lstm": Recurrent,
    "gru, hidden state": lambda: Recurrent(nn.GRU, last="hidden"),
    "rnn": lambda: Recurrent(nn.RNN),
    "over time 1d": OverTime1d,
    "differences": Differences,
    "attention in a frame": LayerNormed,
    "two rates": TwoRates,
}
"""Name -> net, on clips (B, T, 3, 12, 12)."""


class Refused(nn.Module):
    """A net whose ``mix`` has no step form."""

    def __init__(self, mix: Any) -> None:
        super().__init__()
        self.see, self.mix = nn.Conv2d(3, 4, 3, padding=1), mix
        self.recur = nn.LSTM(4, 2, batch_first=True, bidirectional=True)
        self.table = nn.Parameter(torch.randn(1, 64, 4))
        self.even = nn.Conv1d(4, 4, 2, padding="same")

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        x = self.see(clip_BTCHW.flatten(0, 1)).mean((2, 3)).unflatten(0, clip_BTCHW.shape[:2])
        return self.mix(self, x)


def _attention(_: Refused, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x).mean(1)


REFUSED: dict[str, tuple[Any, str]] = {
    "squeeze and excitation": (lambda _, x: (x * x.mean(1, keepdim=True).sigmoid()).mean(1), "single frames"),
    "attention over time": (_attention, "mixes frames"),
    "softmax over time": (lambda _, x: (x.softmax(1) * x).sum(1), "mixes frames"),
    "backwards": (lambda _, x: x.flip(1), "mixes frames"),
    "round": (lambda _, x: x + x.roll(1, 1), "mixes frames"),
    "sorted": (lambda _, x: x.sort(1)[0], "mixes frames"),
    "both ways": (lambda self, x: self.recur(x)[0], "backwards"),
    "one frame": (lambda _, x: x[:, 3], "frame 3"),
    "the last frames": (lambda _, x: x[:, -3:].mean(1), "last 3 frames"),
    "a table over time": (lambda self, x: (x + self.table[:, : x.shape[1]]).mean(1), "table over time"),
    "divided by the length": (lambda _, x: x.sum(1) / x.shape[1], "number of frames"),
    "parts of the clip": (lambda _, x: F.adaptive_avg_pool1d(x.transpose(1, 2), 2), "2 parts"),
    "twice the clip": (lambda _, x: torch.cat([x, x], 1), "behind another"),
    "a loop": (lambda _, x: sum(x[:, t] * 0.5**t for t in range(x.shape[1])), "more for more frames"),
    "faster": (lambda _, x: x.repeat_interleave(2, 1), "several values"),
    "an even kernel": (lambda self, x: self.even(x.transpose(1, 2)), "even kernel"),
    "the mean taken off": (lambda _, x: x - x.mean(1, keepdim=True), "single frames"),
    "first frame off": (lambda _, x: x - x[:, :1], "first frames"),
    "ceil": (lambda _, x: F.max_pool1d(x.transpose(1, 2), 2, ceil_mode=True), "ceil_mode"),
}
"""Name -> (what it does with features (B, T, 4), what the refusal says)."""
