"""The checker of streaming layers refuses layers that break the contract, each in its own way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract import check_streaming_layer
from sidestream.nn.conv3d import CausalConv3d, Conv3d
from sidestream.nn.pool import RunningMean
from sidestream.nn.shift import OnlineShift
from sidestream.nn.steppable import Steppable, step_through
from sidestream.types import NOTHING


def clip() -> Tensor:
    return torch.rand(2, 6, 4, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5


class Scaled(Steppable):
    """Sound as it stands: the frame times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def init_state(self, frame_BCHW: Tensor) -> Any:
        return None

    def step(self, frame_BCHW: Tensor, state: Any) -> tuple[Any, Any]:
        return self.weight * frame_BCHW, None

    def forward(self, clip_BTCHW: Tensor) -> Any:
        return self.weight * clip_BTCHW


class WrongGradient(Scaled):
    def step(self, frame_BCHW: Tensor, state: Any) -> tuple[Any, Any]:
        return self.weight.detach() * frame_BCHW + 0 * self.weight, None


class LooksAhead(Scaled):
    def forward(self, clip_BTCHW: Tensor) -> Any:
        return self.weight * clip_BTCHW + 0 * clip_BTCHW.mean(1, keepdim=True)


class MixesStreams(Scaled):
    def step(self, frame_BCHW: Tensor, state: Any) -> tuple[Any, Any]:
        return self.weight * frame_BCHW + 0 * frame_BCHW.mean(0, keepdim=True), None

    def forward(self, clip_BTCHW: Tensor) -> Any:
        return self.weight * clip_BTCHW + 0 * clip_BTCHW.mean(0, keepdim=True)


class HidesState(OnlineShift):
    """Keeps the last frame in itself, so a stream cannot go back to an old state."""

    kept: Tensor | None = None

    def init_state(self, frame_BCHW: Tensor) -> Any:
        self.kept = super().init_state(frame_BCHW)
        return self.kept

    def step(self, frame_BCHW: Tensor, state: Any) -> tuple[Any, Any]:
        assert self.kept is not None
        answer, self.kept = super().step(frame_BCHW, self.kept)
        return answer, self.kept


class ChangesState(RunningMean):
    def step(self, frame_BCHW: Tensor, state: Any) -> tuple[Any, Any]:
        state[1].add_(1)
        mean = state[0] + (frame_BCHW - state[0]) / state[1]
        return mean.clone(), (mean, state[1])


class SharesItsState(RunningMean):
    def step(self, frame_BCHW: Tensor, state: Any) -> tuple[Any, Any]:
        _, state = super().step(frame_BCHW, state)
        return state[0], state


class KeepsTheFrame(OnlineShift):
    def step(self, frame_BCHW: Tensor, state: Any) -> tuple[Any, Any]:
        answer, _ = super().step(frame_BCHW, state)
        return answer, frame_BCHW[:, : state.shape[1]]


class ForgetsTheEnd(Conv3d):
    def finish(self, state: Any) -> tuple[Tensor, ...]:
        return super().finish(state)[:-1]


def late_conv(kind: Any = Conv3d) -> Any:
    return kind(4, 2, 3, padding=1).double()


def wrong_delay() -> Any:
    layer = late_conv()
    layer.delay_ticks = 2
    return layer


BROKEN: list[tuple[Any, dict[str, Any], str]] = [
    (WrongGradient, {}, "weight: (nothing but zeros|Scalars are not|Tensor-likes are not)"),
    (LooksAhead, {}, "poisoned, answers"),
    (MixesStreams, {}, "Tensor-likes are not close"),
    (lambda: HidesState(0.5), {}, "resumed"),
    (ChangesState, {}, "modified by an inplace operation"),
    (SharesItsState, {}, "written over"),
    (lambda: KeepsTheFrame(0.5), {}, "written over"),
    (late_conv, {}, "delay_ticks is 1"),
    (lambda: late_conv(ForgetsTheEnd), {"is_causal": False}, "shape"),
    (wrong_delay, {"is_causal": False}, "answers in"),
    (lambda: CausalConv3d(4, 2, 3, padding=1).double(), {"receptive_field": 4}, "does not feel frame"),
    (lambda: CausalConv3d(4, 2, 3, padding=1).double(), {"receptive_field": 2}, "with frame 0 poisoned"),
    (lambda: CausalConv3d(4, 2, 2, padding=1, dilation=2).double(), {"receptive_field": 3}, "does not feel frame"),
]


@pytest.mark.parametrize(("build", "options", "message"), BROKEN)
def test_broken_layers_are_refused(build: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((AssertionError, RuntimeError), match=message):
        check_streaming_layer(build(), clip(), **options)


def test_a_sound_layer_passes() -> None:
    check_streaming_layer(Scaled(), clip(), receptive_field=1)


def test_there_is_one_nothing() -> None:
    assert copy.deepcopy({"answer": NOTHING})["answer"] is NOTHING
    assert repr(NOTHING) == "NOTHING"


def test_a_stream_too_short_for_an_answer() -> None:
    answers, _ = step_through(Conv3d(4, 2, (3, 1, 1)).double(), clip()[:, :2])
    assert answers.shape == (2, 0, 2, 3, 3)
