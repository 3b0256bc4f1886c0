"""Sideways and Skip-Sideways: equal to a slow twin tick by tick, to backprop on a still video, and flat in memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from contract import assert_equal, check_sideways_rule
from random_circuits import random_modules, random_pairs
from sidestream.circuit.ages import ages, latency_ticks
from sidestream.circuit.build_stages import stages_of, widened
from sidestream.circuit.cut import cut
from sidestream.circuit.stage import Stages
from sidestream.circuit.wiring import parallel, pipelined, sequential
from sidestream.engine import run
from sidestream.engine.rules.exact import Exact
from sidestream.engine.rules.sideways import Sideways
from sidestream.engine.rules.training import StageGradient, TrainingRule
from sidestream.nn.combine import Chain, PerFrame
from sidestream.nn.conv3d import CausalConv3d
from sidestream.types import NOTHING

mse = nn.functional.mse_loss
EXECUTORS = ("inline", "threads")


def squared_error(answer: tuple[Tensor, ...], target: Tensor) -> Tensor:
    return torch.stack([((a - target) ** 2).mean() for a in answer]).sum()


def half_squared_error(answer: Tensor, target: Tensor) -> Tensor:
    return 0.5 * ((answer - target) ** 2).sum()


def sgd(rate: float):
    return functools.partial(torch.optim.SGD, lr=rate)


def row(num_stages: int, seed: int = 0, width: int = 5) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh()).double() for _ in range(num_stages)]


def twin(
    weights: list[np.ndarray], xs: np.ndarray, ys: np.ndarray, *, rate: float, target: str, loss_delay: int
) -> Iterator[tuple[int, int, int, int, np.ndarray]]:
    """Sideways in numpy on rows of tanh(W x), error 1/2 |out - y|^2: (tick, stage, frame, loss frame, gradient).

    One array per stage for the newest input and one for the cotangent that waits; both are overwritten each tick.
    """
    K, T = len(weights), len(xs)
    held: list[tuple[np.ndarray, int] | None] = [None] * (K + 1)  # input of stage i + 1 in this tick, and its frame
    waiting: list[tuple[np.ndarray, int] | None] = [None] * K
    for tick in range(T + K):
        held[0] = (xs[tick], tick) if tick < T else None
        outs: list[tuple[np.ndarray, int] | None] = [None] * K
        sent: list[tuple[np.ndarray, int] | None] = [None] * K
        for i in range(K):
            if held[i] is not None:
                outs[i] = (np.tanh(weights[i] @ held[i][0]), held[i][1])
        error = None
        if outs[-1] is not None:
            out, frame = outs[-1]
            about = frame if target == "answered" else tick
            error = (out - ys[about], frame) if about < T else None
        updates = []
        for i in range(K):
            cotangent = error if i == K - 1 and not loss_delay else waiting[i]
            if cotangent is None or outs[i] is None:
                continue
            d = cotangent[0] * (1 - outs[i][0] ** 2)
            gradient = np.outer(d, held[i][0])
            yield tick, i + 1, held[i][1], cotangent[1], gradient
            updates.append((i, gradient))
            if i:
                sent[i - 1] = (weights[i].T @ d, cotangent[1])
        for i, gradient in updates:
            weights[i] = weights[i] - rate * gradient
        if loss_delay:
            sent[K - 1] = error
        waiting = sent
        held[1:] = outs


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("rate", [0.0, 0.05])
@pytest.mark.parametrize(("target", "loss_delay"), [("answered", 0), ("answered", 1), ("newest", 0), ("newest", 1)])
@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_equals_a_slow_twin_in_every_tick(depth: int, target: str, loss_delay: int, rate: float, executor: str) -> None:
    """On a moving stream, also while the weights move, up to the last answer of the drained pipeline."""
    modules = row(depth)
    weights = [m[0].weight.detach().numpy().copy() for m in modules]
    xs, ys = np.random.default_rng(1).standard_normal((2, 17, 5))
    records: list[StageGradient] = []
    rule = Sideways(
        half_squared_error,
        optimizers=sgd(rate),
        target=target,
        loss_delay=loss_delay,
        observe=records.append,
    )
    pairs = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in zip(xs, ys)]
    list(run(pipelined(stages_of(modules, pairs[0][0])), pairs, rule=rule, executor=executor))
    expected = list(twin(weights, xs, ys, rate=rate, target=target, loss_delay=loss_delay))
    if target == "newest":  # the stages behind the last frame have no target any more, and the stream has ended
        expected = [e for e in expected if e[0] < len(xs)]
        records = [r for r in records if r.tick < len(xs)]
    records.sort(key=lambda r: (r.tick, r.stage))
    found = [(r.tick, r.stage, r.input_frame, r.cotangent_frame) for r in records]
    assert found == [e[:4] for e in expected]
    assert len(found) > depth * 5 - 1
    for r, (*_, gradient) in zip(records, expected, strict=True):  # float64; numpy and torch sum in another order
        np.testing.assert_allclose(r.gradients["0.weight"].numpy(), gradient, rtol=1e-9, atol=1e-13)
    if target == "answered":
        for module, weight in zip(modules, weights, strict=True):
            np.testing.assert_allclose(module[0].weight.detach().numpy(), weight, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("loss_delay", [0, 1])
@pytest.mark.parametrize("depth", range(1, 9))
def test_a_still_video_gives_backprop(depth: int, loss_delay: int, executor: str) -> None:
    x, y = random_pairs(5, 1)[0]
    records = check_sideways_rule(
        pipelined(stages_of(row(depth), x)), (x, y), mse, executor=executor, loss_delay=loss_delay
    )
    for number in range(1, depth + 1):
        first = min(r.tick for r in records if r.stage == number)
        assert first == (depth - 1) + (depth - number) + loss_delay


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.sampled_from([pipelined, parallel, sequential]))
def test_a_still_video_gives_backprop_on_random_circuits(seed: int, depth: int, wiring: object) -> None:
    """No stage goes back before all of its readers have sent, so that no gradient is ever a part of a gradient."""
    stages = random_modules(seed, depth)
    records: list[StageGradient] = []
    x, y = random_pairs(seed, 1)[0]
    rule = Sideways(squared_error, observe=records.append)
    list(run(wiring(stages), [(x, y)] * (3 * depth + 2), rule=rule, executor="inline"))  # type: ignore[operator]
    loss = squared_error(stages(x), y)
    for number, stage in enumerate(stages, start=1):
        true = torch.autograd.grad(loss, stage.module.weights, retain_graph=True, allow_unused=True)[0]
        mine = [r.gradients["weights"] for r in records if r.stage == number]
        assert bool(mine) == (true is not None)
        for gradient in mine:
            torch.testing.assert_close(gradient, true, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss_delay", [0, 1])
@pytest.mark.parametrize("depth", [2, 3, 5, 8])
def test_age_gaps_on_a_moving_video(depth: int, loss_delay: int) -> None:
    """The input is 2 (K - i) frames newer than the gradient; one more with the loss one tick later."""
    pairs = random_pairs(2, 2 * depth + 6)
    records: list[StageGradient] = []
    rule = Sideways(mse, loss_delay=loss_delay, observe=records.append)
    list(run(pipelined(stages_of(row(depth), pairs[0][0])), pairs, rule=rule))
    assert {(r.stage, r.age_gap) for r in records} == {(i, 2 * (depth - i) + loss_delay) for i in range(1, depth + 1)}


def skip_modules(depth: int, skips: str) -> list[nn.Module]:
    """VGG-like: a pooling stage in the middle and a growing number of channels, where the skips allow that."""
    torch.manual_seed(1)
    widths = [3] + [4] * depth if skips == "add" else [3] + [4 + n // 2 for n in range(depth)]
    modules: list[nn.Module] = []
    for n in range(depth):
        layers: list[nn.Module] = [nn.Conv2d(widths[n], widths[n + 1], 3, padding=1), nn.Tanh()]
        if n == 2 and skips != "add":
            layers.append(nn.AvgPool2d(2))
        module: nn.Module = nn.Sequential(*layers).double()
        modules.append(widened(module, widths[n - 1]) if skips == "concat" and n >= 2 else module)
    return modules


def skip_stages(depth: int, skips: str) -> Stages:
    return stages_of(skip_modules(depth, skips), torch.zeros(1, 3, 8, 8, dtype=torch.float64), skips=skips)


def mean_square(answer: Tensor, target: Tensor) -> Tensor:
    return ((answer - target) ** 2).mean()


@pytest.mark.parametrize("skips", ["add", "concat", "projection"])
@pytest.mark.parametrize("depth", [3, 4, 5, 6, 8])
def test_skip_sideways_on_a_still_video_gives_backprop_of_the_residual_net(depth: int, skips: str) -> None:
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stages = skip_stages(depth, skips)
    for circuit in (parallel(stages), parallel(stages, equalise_skips=True)):
        check_sideways_rule(circuit, (x, torch.tensor(0.3, dtype=torch.float64)), mean_square)


@pytest.mark.parametrize("skips", ["add", "concat", "projection"])
def test_skip_sideways_equals_the_residual_net_shifted_where_skips_are_equalised(skips: str) -> None:
    """And with skips of one tick it does not: stage i then sees frames of several ages."""
    stages = skip_stages(5, skips)
    frames = torch.randn(9, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = [(frame, torch.tensor(0.0)) for frame in frames]
    equalised = parallel(stages, equalise_skips=True)
    outputs = list(run(equalised, pairs, rule=Sideways(mean_square), executor="inline"))
    assert latency_ticks(equalised) == 4
    for output, frame in zip(outputs, frames, strict=True):
        assert output.tick == output.frame_index + 4
        assert_equal(output.value, stages(frame).detach(), f"frame {output.frame_index}")
    mixed = parallel(stages)
    assert [set(a) for a in ages(mixed)[1:-1]] == [{0}, {1}, {1, 2}, {2, 3}, {2, 3, 4}]
    others = list(run(mixed, pairs, rule=Sideways(mean_square), executor="inline"))
    for output, equalised_output in zip(others, outputs, strict=True):
        expected = unrolled(stages, frames, 5, output.tick)
        assert_equal(output.value, expected.detach(), f"tick {output.tick}")
        is_last = output.frame_index == len(frames) - 1  # followed only by itself
        assert torch.equal(output.value, equalised_output.value) == is_last


def unrolled(stages: Stages, frames: Tensor, number: int, tick: int) -> Tensor:
    """What unit ``number`` computes in a tick: H_i(out_(i-1), out_(i-2)) of the tick before; stage 1 sees the frame."""
    if number == 1:
        return stages[0].module(frames[min(tick, len(frames) - 1)])
    read = [number - 1] if number == 2 else [number - 1, number - 2]
    return stages[number - 1].module(*(unrolled(stages, frames, n, tick - 1) for n in read))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("stride", [1, 2])
def test_stages_with_state_on_a_video_that_has_stood_still_for_long(stride: int, executor: str) -> None:
    """Convolutions over time then see the same frame everywhere. Of what a stage answers only the part through its
    newest frame has a gradient (none crosses the state), as when a chain is stepped with its states detached. With a
    temporal stride, cotangents wait for the next tick in which their stage answers."""
    torch.manual_seed(0)
    chain = Chain(
        PerFrame(nn.Conv2d(3, 4, 3, padding=1)),
        CausalConv3d(4, 4, 3, stride=(stride, 1, 1), padding=1),
        PerFrame(nn.Tanh()),
        CausalConv3d(4, 2, 3, padding=1),
    ).double()
    frame, target = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 2, 4, 4).double()
    state, true = chain.init_state(frame), ()
    for _ in range(20):
        answer, state = chain.step(frame, state)
        state = pytree.tree_map(lambda s: s.detach() if isinstance(s, Tensor) else s, state)
        if answer is not NOTHING:
            true = torch.autograd.grad(mse(answer, target), list(chain.parameters()))
    stages = cut(chain, frame, num_stages=4, costs="uniform")
    rule = Sideways(mse)
    outputs = list(run(pipelined(stages), [(frame, target)] * 29, rule=rule, executor=executor))
    assert len(outputs) == len(range(0, 29, stride))
    found = [g for number in range(1, 5) for g in rule.gradients(number).values()]
    torch.testing.assert_close(found, list(true), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("wiring", [pipelined, parallel])
def test_threads_equals_inline_to_the_bit(wiring: object) -> None:
    """Gradients, losses and weights, over several clips with an optimiser that remembers."""
    for seed, update, max_norm in [(0, "tick", None), (1, 3, 0.05), (2, "clip", None)]:
        results = []
        for executor in EXECUTORS:
            stages, records = random_modules(seed, 7), []
            rule = Sideways(
                squared_error,
                optimizers=functools.partial(torch.optim.AdamW, lr=0.02),
                update=update,
                max_norm=max_norm,
                observe=records.append,
            )
            losses = [
                o.loss
                for clip in range(3)
                for o in run(wiring(stages), random_pairs(clip, 20), rule=rule, executor=executor, num_threads=3)  # type: ignore[operator]
            ]
            records.sort(key=lambda r: r.stage)  # stable: by stage, then in the order in which they came
            gradients = [(r.stage, r.tick, r.input_frame, r.cotangent_frame, r.gradients) for r in records]
            results.append((losses, gradients, [list(stage.module.parameters()) for stage in stages]))
        assert_equal(results[1], results[0], f"update {update}")


def most_inputs_alive(rule: TrainingRule, num_frames: int, depth: int = 6) -> list[int]:
    """Per stage but the first: how many of the inputs that it ever had are in memory at once, looked at whenever an
    answer comes out. (The first stage's are the frames, which the caller holds.)"""
    modules = row(depth)
    given: list[list[StorageWeakRef]] = [[] for _ in modules]
    for module, refs in zip(modules, given, strict=True):
        module.register_forward_pre_hook(lambda _, x, refs=refs: refs.append(StorageWeakRef(x[0].untyped_storage())))
    pairs = random_pairs(0, num_frames)
    circuit = pipelined(stages_of(modules, pairs[0][0]))
    most = [0] * depth
    for _ in run(circuit, pairs, rule=rule, executor="inline"):
        most = [max(m, sum(not ref.expired() for ref in refs)) for m, refs in zip(most, given, strict=True)]
    return most[1:]


def test_sideways_keeps_no_input_after_its_tick_however_long_the_stream() -> None:
    """So at most the one that it works on. Exact keeps 2 (K - i) of them from tick to tick, and with the graph the
    outputs of the stage before, one more."""
    for num_frames in (16, 128):
        assert most_inputs_alive(Sideways(mse), num_frames) == [0] * 5
        assert most_inputs_alive(Exact(mse, keep="inputs"), num_frames) == [2 * (6 - i) for i in range(2, 7)]
        assert most_inputs_alive(Exact(mse), num_frames) == [2 * (6 - i) + 1 for i in range(2, 7)]


class Saved:
    """What autograd records but for the weights: the most bytes at any moment, each piece of memory once."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.weights = {p.untyped_storage().data_ptr() for m in modules for p in m.parameters()}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def pack(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() in self.weights:
            return value
        self.alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return value


def test_what_autograd_records_is_flat_in_the_length_of_the_stream() -> None:
    """Under Sideways, and far below what backprop through the whole clip records."""
    modules = row(6, width=64)
    most = {}
    for num_frames in (16, 128):
        for name in ("sideways", "backprop"):
            pairs = ((torch.randn(16, 64).double(), torch.zeros(16, 64).double()) for _ in range(num_frames))
            saved = Saved(modules)
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x):
                if name == "sideways":
                    circuit = pipelined(stages_of(modules, torch.zeros(16, 64).double()))
                    for _ in run(circuit, pairs, rule=Sideways(mse), executor="inline"):
                        pass
                else:
                    torch.stack([mse(nn.Sequential(*modules)(x), y) for x, y in pairs]).mean().backward()
            most[name, num_frames] = saved.most
    piece = 16 * 64 * 8
    assert 0 < most["sideways", 128] == most["sideways", 16] <= 2 * 6 * piece  # the old and the new value of each wire
    assert most["backprop", 128] == 8 * most["backprop", 16] == 128 * (6 + 2) * piece  # frame, outputs, target
