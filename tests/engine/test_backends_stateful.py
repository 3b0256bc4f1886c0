"""Stages with a state on every back end: the same stream as in eager, one program per kind of tick, states that can be
read, kept and handed on, and what is refused."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sidestream.circuit.cut import cut
from sidestream.circuit.group import RowStep
from sidestream.circuit.stage import Stage, Stages
from sidestream.circuit.wiring import pipelined
from sidestream.engine.backends import compile_stages, cut_for_backend
from sidestream.engine.backends.stateful import ProgramStep, ticks_of
from sidestream.engine.run import run
from sidestream.errors import BackendError, CircuitError
from sidestream.nn.attention import TemporalAttention
from sidestream.nn.combine import Chain, Parallel, PerFrame, Residual
from sidestream.nn.conv3d import CausalConv3d, Conv3d
from sidestream.nn.pool import Newest, RunningMean
from sidestream.nn.recurrent import LSTM, ConvGRU
from sidestream.nn.shift import OnlineShift
from sidestream.nn.sliding import SlidingWindow
from sidestream.types import NOTHING

BACKENDS = ["onnxruntime", "openvino", pytest.param("inductor", marks=pytest.mark.slow)]
TOLERANCE = 1e-4
"""Of the largest value, after some frames: the runtimes sum in another order, and a state carries that on."""
NUM_WARM = 8
"""Frames after which every stream here is under way."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class ClipModel(nn.Module):
    """Without a step form."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 4, 3, padding=1)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self.conv(clip_BTCHW.transpose(1, 2)).amax(2)


def conv(inside: int, outside: int) -> PerFrame:
    return PerFrame(nn.Conv2d(inside, outside, 3, padding=1))


def branches() -> Chain:
    """An encoder, branches that remember, others that look ahead, a head."""
    late = Parallel(Conv3d(4, 2, 3, padding=1), CausalConv3d(4, 2, 3, padding=1), combine="concat")
    head = PerFrame(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)))
    return Chain(conv(4, 4), Residual(Chain(OnlineShift(0.25), conv(4, 4))), late, head)


KINDS: dict[str, Callable[[], Chain]] = {
    "shift": lambda: Chain(conv(4, 4), OnlineShift(0.25)),
    "running mean": lambda: Chain(RunningMean()),
    "causal convolution": lambda: Chain(CausalConv3d(4, 4, 3)),
    "causal convolution with a temporal stride": lambda: Chain(CausalConv3d(4, 4, 3, stride=(2, 1, 1))),
    "look-ahead": lambda: Chain(Conv3d(4, 4, 3, padding=1)),
    "look-ahead with a temporal stride": lambda: Chain(Conv3d(4, 4, 3, stride=(2, 1, 1), padding=1)),
    "LSTM": lambda: Chain(LSTM(8, 8, num_layers=2)),
    "ConvGRU": lambda: Chain(ConvGRU(4, 4)),
    "attention": lambda: Chain(TemporalAttention(8, 2, window=4)),
    "sliding window": lambda: Chain(SlidingWindow(ClipModel(), 4, period_ticks=2)),
    "branches": branches,
    "strides one behind the other": lambda: Chain(
        Newest(2), OnlineShift(0.25), CausalConv3d(4, 4, 3, stride=(2, 1, 1)), OnlineShift(0.25)
    ),
}
FLOAT64 = ["running mean"]
"""Kinds with a state in double precision, which OpenVINO does not compute with: refused there."""


def made(kind: str) -> Chain:
    torch.manual_seed(0)
    return KINDS[kind]().eval()


def frames(count: int, kind: str = "", seed: int = 1) -> list[Tensor]:
    shape = (1, 8) if kind in ("LSTM", "attention") else (1, 4, 6, 6)
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).unbind(0))


def converted(kind: str, backend: str, num_stages: int = 1) -> tuple[Stages, Stages]:
    """The stages in eager, and on ``backend``."""
    stages = cut(made(kind), frames(1, kind)[0], num_stages=num_stages, check="once")
    return stages, compile_stages(stages, backend, check="once")


def assert_close(found: Any, expected: Any) -> None:
    found, expected = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, Tensor) and b.is_floating_point():
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert not b.numel() or float((a - b).abs().max()) <= TOLERANCE * max(float(b.abs().max()), 0.1)
        else:
            assert torch.equal(a, b) if isinstance(b, Tensor) else a == b, f"{a} instead of {b}"


def answers(stages: Stages, given: list[Tensor], executor: str = "inline") -> list[tuple[int, Any]]:
    return [(output.frame_index, output.value) for output in run(pipelined(stages), given, executor=executor)]


def parts_of(stage: Stage) -> tuple[Stage, ...]:
    return stage.step.parts if isinstance(stage.step, RowStep) else (stage,)


def only_programs(stages: Stages, used: Counter[tuple[int, int, int]]) -> Stages:
    """The stages without eager to fall back on; ``used`` counts the ticks of each program."""

    def fail(inputs: Any, state: Any) -> Any:
        raise AssertionError("a tick ran in eager")

    def without(number: int, n: int, part: Stage) -> Stage:
        step = part.step
        assert isinstance(step, ProgramStep)
        if not step.programs:
            return part  # the same program in every tick

        def counting(place: tuple[int, int, int], program: Any) -> Any:
            def counted(inputs: Any, state: Any) -> Any:
                used[place] += 1
                return program(inputs, state)

            used[place] += 0
            return counted

        programs = {kind: counting((number, n, m), p) for m, (kind, p) in enumerate(step.programs.items())}
        return replace(part, step=ProgramStep(programs, fail, step.num_outputs))

    def of(number: int, stage: Stage) -> Stage:
        parts = tuple(without(number, n, part) for n, part in enumerate(parts_of(stage)))
        return replace(stage, step=replace(stage.step, parts=parts)) if isinstance(stage.step, RowStep) else parts[0]

    return stages.with_stages(tuple(of(number, stage) for number, stage in enumerate(stages, start=1)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_stream_is_that_of_eager(kind: str, backend: str) -> None:
    if kind in FLOAT64 and backend == "openvino":
        with pytest.raises(BackendError, match=r"it has tensors of type torch\.float64 on its border"):
            converted(kind, backend)
        return
    stages, there = converted(kind, backend)
    period = made(kind).period_ticks
    assert [stage.backend for stage in there] == [backend] * len(stages)
    # two runs in a row, to the end of the stream
    for given in (frames(NUM_WARM, kind), frames(7, kind, seed=2)):
        expected = answers(stages, given)
        found = answers(there, given, "threads")
        assert [n for n, _ in found] == [n for n, _ in expected]
        assert len(found) == -(-len(given) // period)
        assert_close(found, expected)
    # a state that was made in eager goes on in the runtime, in programs alone, each of which has its ticks
    used: Counter[tuple[int, int, int]] = Counter()
    running, state = only_programs(there, used), stages.init_state()
    for frame in frames(NUM_WARM, kind):
        _, state = stages.step(state, frame)
    kept, own = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, state), state
    for frame in frames(2 * period, kind, seed=3):
        expected_answer, state = stages.step(state, frame)
        answer, own = running.step(own, frame)
        assert (answer is NOTHING) == (expected_answer is NOTHING)
        assert_close(answer, expected_answer)
        assert_close(own, state)
    assert used
    assert min(used.values()) > 0, "a program is never chosen"
    # an old state stays valid, and one that was made on the runtime goes on in eager
    again = kept
    for frame in frames(period, kind, seed=3):
        answer, again = there.step(again, frame)
    resumed, expected_state = again, again
    for frame in frames(period, kind, seed=4):
        answer, resumed = there.step(resumed, frame)
        expected_answer, expected_state = stages.step(expected_state, frame)
        assert_close(answer, expected_answer)
    assert_close(resumed, expected_state)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_stages_in_a_row_with_a_state_each(backend: str) -> None:
    stages, there = converted("branches", backend, num_stages=3)
    given = frames(9)
    assert len(there) == 3
    for executor in ("inline", "threads", "sequential"):
        assert_close(answers(there, given, executor), answers(stages, given))


def test_kinds_of_ticks() -> None:
    """Where only tensors change there is one program; a stride counts, so there is one for each of its ticks."""
    for kind, expected in {"shift": [1], "look-ahead": [1], "sliding window": [2, 1], "branches": [1, 1, 1]}.items():
        stages = cut(made(kind), frames(1, kind)[0], num_stages=1, check="off")
        (ticks,) = ticks_of(stages)
        assert ticks is not None
        assert [len(part.kinds) for part in ticks] == expected, kind


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_state_that_grows_is_refused_or_stays_in_eager(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    chain = Chain(LSTM(8, 8), PerFrame(nn.Linear(8, 8)), TemporalAttention(8, 2, window=None)).eval()
    given = frames(6, "LSTM")
    stages = cut(chain, given[0], cut=("2",), check="off")
    with pytest.raises(BackendError, match=f"'{backend}' cannot run stage '2': its state still changes its shapes"):
        compile_stages(stages, backend)
    with caplog.at_level(logging.WARNING):
        there = compile_stages(stages, backend, on_unsupported="eager")
    assert [stage.backend for stage in there] == [backend, "eager"]
    assert "'2' stays in eager" in caplog.text
    assert_close(answers(there, given), answers(stages, given))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.count


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_state_in_buffers_is_refused(backend: str) -> None:
    chain = Chain(OnlineShift(0.25), PerFrame(Counts()), OnlineShift(0.25)).eval()
    stages = cut(chain, frames(1)[0], cut=("1", "2"), check="once")
    assert [stage.hides_state for stage in stages] == [False, True, False]
    with pytest.raises(BackendError, match="cannot run stage '1': it carries state"):
        compile_stages(stages, backend, check="once")
    there = compile_stages(stages, backend, check="once", on_unsupported="eager")
    assert [stage.backend for stage in there] == [backend, "eager", backend]
    assert_close(answers(there, frames(4)), answers(stages, frames(4)))


@pytest.mark.parametrize("kind", ["shift", "look-ahead"])
def test_weights_that_change_after_the_conversion_are_refused(kind: str) -> None:
    chain = made(kind)
    there = compile_stages(cut(chain, frames(1)[0], num_stages=1, check="off"), "onnxruntime", check="off")
    answers(there, frames(3))
    with torch.no_grad():
        next(chain.parameters()).mul_(2)
    with pytest.raises(CircuitError, match="were changed after it was converted"):
        answers(there, frames(3))


def test_a_model_with_state_is_balanced_by_what_its_stages_take_there() -> None:
    there = cut_for_backend(made("branches"), frames(1)[0], "onnxruntime", num_stages=2, rounds=1, num_workers=2)
    assert [stage.backend for stage in there] == ["onnxruntime"] * 2
    assert all(stage.cost_seconds and stage.cost_seconds > 0 for stage in there)
    assert_close(answers(there, frames(6)), answers(cut(made("branches"), frames(1)[0], num_stages=1), frames(6)))
