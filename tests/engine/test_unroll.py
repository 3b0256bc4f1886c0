"""``unroll``: the answers of ``run``, both ways; gradients against a slow twin, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from random_circuits import random_modules
from sidestream.circuit.ages import information_latency_ticks, lags_of, latency_ticks
from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.cut import cut
from sidestream.circuit.stage import Stages
from sidestream.circuit.wire import Circuit
from sidestream.circuit.wiring import parallel, pipelined, semi_parallel, sequential, with_feedback, with_periods
from sidestream.engine.run import run
from sidestream.engine.unroll import Unrolled, reason_for_ticks, unroll
from sidestream.errors import CircuitError, LayoutError
from sidestream.nn.combine import Chain, PerFrame
from sidestream.nn.conv3d import CausalConv3d, Conv3d

NUM_FRAMES = 9


def fed_back(circuit: Circuit) -> Circuit:
    """The last stage's first output goes into the first input of the first stage but one that has several."""
    stages = circuit.stages
    target = next((n for n, s in enumerate(stages, start=1) if s.num_inputs > 1), 2)
    source = len(stages)
    initial = torch.full((2, 5), 0.1, dtype=torch.float64)
    return with_feedback(circuit, source=source, output=0, target=target, input=0, initial=initial, delay=1)


WIRINGS: dict[str, Callable[[Stages], Circuit]] = {
    "sequential": sequential,
    "pipelined": pipelined,
    "semi-parallel aligned": lambda s: semi_parallel(s, groups=2),
    "semi-parallel fresh": lambda s: semi_parallel(s, groups=2, skips="fresh"),
    "parallel": parallel,
    "periods": lambda s: with_periods(parallel(s), [1, 1, 2, 2, 4][: len(s)]),
    "periods, aligned": lambda s: with_periods(pipelined(s), [1, 2, 2, 3, 3][: len(s)]),
    "feedback": lambda s: fed_back(parallel(s)),
    "feedback, sequential": lambda s: fed_back(sequential(s)),
    "feedback and periods": lambda s: with_periods(fed_back(pipelined(s)), [1, 1, 1, 2, 2][: len(s)]),
}
BY_TICKS_ONLY = ("periods", "feedback")


def clip_of(seed: int, num_frames: int = NUM_FRAMES) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, num_frames, 5, generator=generator, dtype=torch.float64)


def ways(name: str) -> list[str]:
    return ["ticks"] if name.startswith(BY_TICKS_ONLY) else ["ticks", "stages"]


@pytest.mark.parametrize("name", WIRINGS)
@pytest.mark.parametrize(("seed", "num_frames"), [*((n, NUM_FRAMES) for n in range(6)), (0, 1), (1, 2)])
def test_answers_are_those_of_run(name: str, seed: int, num_frames: int) -> None:
    circuit, clip = WIRINGS[name](random_modules(seed, 5)), clip_of(seed, num_frames)
    expected = list(run(circuit, clip.unbind(1), executor="inline"))
    assert len(expected) == num_frames
    for way in ways(name):
        with torch.no_grad():
            found = unroll(circuit, clip, way=way)  # type: ignore[arg-type]
        assert found.frame_indices == tuple(o.frame_index for o in expected)
        assert found.ticks == tuple(o.tick for o in expected)
        assert found.oldest_frames == tuple(o.oldest_frame_index for o in expected)
        assert found.newest_frames == tuple(o.newest_frame_index for o in expected)
        assert found.is_warm_up == tuple(o.is_warm_up for o in expected)
        for n, output in enumerate(expected):
            for a, e in zip(found.answers, output.value, strict=True):
                torch.testing.assert_close(a[:, n], e.clone(), rtol=1e-12, atol=1e-14)


def slow_answers(circuit: Circuit, clip: Tensor, num_ticks: int) -> list[tuple[Tensor, ...]]:
    """What the design says, by recursion over ticks: wires, clocks that hold, feedback that starts at its initial."""
    lags = lags_of(circuit)

    @cache
    def written(number: int, tick: int) -> tuple[Tensor, ...] | None:
        if tick < 0:
            return None
        if number == 0:
            return (clip[:, min(tick, clip.shape[1] - 1)],)
        period, phase = circuit.periods[number - 1], circuit.phases[number - 1]
        if tick % period != phase:
            return written(number, tick - 1)
        inputs = read(number, tick)
        return None if inputs is None else circuit.stages[number - 1].module(*inputs)

    def read(number: int, tick: int) -> tuple[Tensor, ...] | None:
        values: list[Any] = []
        for w in circuit.wires_into(number):
            made = None
            for earlier in range(tick - w.delay, -1, -1) if w.is_feedback else [tick - w.delay]:
                made = written(w.source, earlier)
                if made is not None:
                    break
            values.append(made[w.output] if made is not None else (w.initial if w.is_feedback else None))
        return None if any(v is None for v in values) else tuple(values)

    answers = [read(circuit.sink, tick) for tick in range(lags[-1], num_ticks)]
    assert all(a is not None for a in answers)
    return answers  # type: ignore[return-value]


def scalar(columns: list[Tensor]) -> Tensor:
    """A loss in which every answer has a weight of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for k, answers in enumerate(columns, start=1):
        weights = torch.randn(answers.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        total = total + (weights * answers.square()).sum()
    return total


@pytest.mark.parametrize("name", WIRINGS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("drain", [True, False])
def test_gradients_are_those_of_the_slow_twin(name: str, seed: int, drain: bool) -> None:
    circuit, clip = WIRINGS[name](random_modules(seed, 5)), clip_of(seed).requires_grad_()
    num_ticks = NUM_FRAMES + (latency_ticks(circuit) if drain else 0)
    modules = nn.ModuleList([s.module for s in circuit.stages])
    wanted = [torch.stack(c, 1) for c in zip(*slow_answers(circuit, clip, num_ticks), strict=True)]
    variables = {"clip": clip, **dict(modules.named_parameters())}
    expected = torch.autograd.grad(scalar(wanted), list(variables.values()), allow_unused=True)
    for way in ways(name):
        found = unroll(circuit, clip, way=way, drain=drain)  # type: ignore[arg-type]
        for a, e in zip(found.answers, wanted, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14)
        gradients = torch.autograd.grad(scalar(list(found.answers)), list(variables.values()), allow_unused=True)
        for key, a, e in zip(variables, gradients, expected, strict=True):
            assert (a is None) == (e is None), key
            if e is not None:
                torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12, msg=f"{way}: {key}")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("drain", [True, False])
def test_traces_agree_and_know_their_frames(seed: int, drain: bool) -> None:
    circuit, clip = parallel(random_modules(seed, 5)), clip_of(seed)
    by_ticks = unroll(circuit, clip, way="ticks", traced=True, drain=drain)
    by_stages = unroll(circuit, clip, way="stages", traced=True, drain=drain)
    for number, (a, b) in enumerate(zip(by_ticks.traces, by_stages.traces, strict=True), start=1):
        assert (a.ticks, a.oldest_frames, a.newest_frames) == (b.ticks, b.oldest_frames, b.newest_frames)
        assert a.ticks[0] == lags_of(circuit)[number]
        for x, y in zip(a.outputs, b.outputs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)
    last = by_stages.traces[-1].outputs[0][:, -len(by_stages.ticks) :]
    torch.testing.assert_close(last, by_stages.answers[0], rtol=0, atol=0)


def test_without_draining_only_what_is_answered_in_time() -> None:
    circuit, clip = parallel(random_modules(3, 5)), clip_of(3)
    latency = latency_ticks(circuit)
    early, whole = unroll(circuit, clip, drain=False), unroll(circuit, clip)
    assert early.ticks == tuple(range(latency, NUM_FRAMES))
    assert early.newest_frames == tuple(t - information_latency_ticks(circuit) for t in early.ticks)
    torch.testing.assert_close(early.answers[0], whole.answers[0][:, : len(early.ticks)], rtol=0, atol=0)


def test_stateful_stages_keep_their_state_from_tick_to_tick() -> None:
    """A cut chain with temporal convolutions: the clip form of the whole is an independent way to the same gradient."""
    torch.manual_seed(0)
    chain = Chain(
        CausalConv3d(3, 4, (2, 1, 1)), PerFrame(nn.Tanh()), CausalConv3d(4, 2, (3, 1, 1)), PerFrame(nn.Tanh())
    ).double()
    clip = torch.randn(1, 7, 3, 4, 4, dtype=torch.float64)
    circuit = pipelined(cut(chain, clip[:, 0], cut=("2",), costs="uniform"))
    assert reason_for_ticks(circuit) is not None
    found = unroll(circuit, clip)
    torch.testing.assert_close(found.answers, chain(clip))
    parameters = dict(chain.named_parameters())
    a = torch.autograd.grad(found.answers.square().sum(), list(parameters.values()))
    e = torch.autograd.grad(chain(clip).square().sum(), list(parameters.values()))
    for name, x, y in zip(parameters, a, e, strict=True):
        torch.testing.assert_close(x, y, msg=name)


def test_gradient_mode_is_the_callers() -> None:
    circuit = parallel(random_modules(1, 3))
    for way in ("ticks", "stages"):
        assert unroll(circuit, clip_of(1), way=way).answers[0].requires_grad  # type: ignore[arg-type]
        with torch.no_grad():
            found: Unrolled = unroll(circuit, clip_of(1), way=way)  # type: ignore[arg-type]
        assert not found.answers[0].requires_grad
        assert not found.answers[0].is_inference()


def test_what_cannot_be_unrolled_says_why() -> None:
    circuit = parallel(random_modules(1, 4))
    assert reason_for_ticks(circuit) is None
    with pytest.raises(CircuitError, match="feedback"):
        unroll(fed_back(circuit), clip_of(1), way="stages")
    with pytest.raises(CircuitError, match="periods"):
        unroll(with_periods(circuit, [1, 1, 1, 2]), clip_of(1), way="stages")
    with pytest.raises(CircuitError, match="expected 'auto'"):
        unroll(circuit, clip_of(1), way="frames")  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="4 frames or more"):
        unroll(circuit, clip_of(1, 3), drain=False)
    with pytest.raises(CircuitError, match="takes 2 inputs"):
        unroll(parallel(random_modules(1, 3, num_sources=2)), clip_of(1))
    ahead = cut(
        Chain(Conv3d(3, 2, (3, 1, 1), padding=(1, 0, 0))), torch.zeros(1, 3, 2, 2), num_stages=1, costs="uniform"
    )
    with pytest.raises(CircuitError, match="looks 1 ticks ahead"):
        unroll(sequential(ahead), torch.zeros(1, 5, 3, 2, 2))
    noisy = parallel(stages_of([nn.BatchNorm2d(3), nn.Identity()], torch.zeros(2, 3, 4, 4)))
    assert "has a state" in (reason_for_ticks(noisy) or "")
