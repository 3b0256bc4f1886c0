"""The exact rule: autograd's own gradients, parameter by parameter, on random circuits, whatever is kept."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from contract import assert_equal, check_exact_rule, mean_loss
from random_circuits import random_modules, random_pairs
from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.cut import cut
from sidestream.circuit.stage import Stages
from sidestream.circuit.wiring import parallel, pipelined, semi_parallel, sequential
from sidestream.engine import run
from sidestream.engine.rules.exact import KEEP, Exact
from sidestream.engine.rules.training import StageGradient
from sidestream.errors import CircuitError, InputError
from sidestream.nn.combine import Chain, PerFrame
from sidestream.nn.conv3d import CausalConv3d
from sidestream.nn.recurrent import ConvGRU
from sidestream.types import NOTHING

WIRINGS = {
    "sequential": sequential,
    "pipelined": pipelined,
    "parallel": parallel,
    "semi": lambda stages: semi_parallel(stages, groups=(len(stages) + 1) // 2),
    "fresh": lambda stages: semi_parallel(stages, groups=(len(stages) + 1) // 2, skips="fresh"),
}


def squared_error(answer: tuple[Tensor, ...], target: Tensor) -> Tensor:
    return torch.stack([((a - target) ** 2).mean() for a in answer]).sum()


def row(num_stages: int, seed: int = 0, width: int = 5) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [nn.Sequential(nn.Linear(width, width), nn.Tanh()).double() for _ in range(num_stages)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 8),
    st.integers(1, 2),
    st.integers(1, 7),
    st.sampled_from(sorted(WIRINGS)),
    st.sampled_from(KEEP),
    st.sampled_from(["inline", "threads"]),
)
def test_equals_autograd_on_random_circuits(
    seed: int, depth: int, num_sources: int, num_frames: int, wiring: str, keep: str, executor: str
) -> None:
    circuit = WIRINGS[wiring](random_modules(seed, depth, num_sources=num_sources))
    pairs = random_pairs(seed, num_frames, num_sources=num_sources)
    check_exact_rule(circuit, pairs, squared_error, executor=executor, keep=keep)


@pytest.mark.parametrize("depth", range(1, 9))
def test_pipelined_equals_the_model_itself(depth: int) -> None:
    """Against the stages called in a row on each frame: no wires, no ticks."""
    stages, pairs = random_modules(7, depth), random_pairs(3, 5)
    rule = Exact(squared_error)
    list(run(pipelined(stages), pairs, rule=rule, executor="inline"))
    loss = torch.stack([squared_error(stages(x), y) for x, y in pairs]).mean()
    for number, stage in enumerate(stages, start=1):
        true = torch.autograd.grad(loss, stage.module.weights, retain_graph=True, allow_unused=True)[0]
        if true is not None:
            torch.testing.assert_close(rule.gradients(number)["weights"], true, rtol=1e-9, atol=1e-13)


def test_every_gradient_is_taken_at_its_own_frame_and_tick_by_tick_right() -> None:
    """One record per stage and frame; each equals autograd on that frame alone; it comes 2 (K - i) ticks late."""
    modules, pairs = row(4), random_pairs(1, 6)
    loss = nn.functional.mse_loss
    records: list[StageGradient] = []
    circuit = pipelined(stages_of(modules, pairs[0][0]))
    list(run(circuit, pairs, rule=Exact(loss, observe=records.append), executor="inline"))
    assert sorted((r.stage, r.input_frame) for r in records) == [(i, f) for i in range(1, 5) for f in range(6)]
    for r in records:
        x, y = pairs[r.input_frame]
        true = torch.autograd.grad(loss(nn.Sequential(*modules)(x), y), modules[r.stage - 1][0].weight)[0]
        torch.testing.assert_close(r.gradients["0.weight"], true, rtol=1e-11, atol=1e-14)
        assert r.age_gap == 0
        assert r.tick == r.input_frame + (r.stage - 1) + 2 * (4 - r.stage)


def test_stage_i_keeps_2_k_minus_i_plus_1_inputs() -> None:
    """1F1B: counted at the stages' own memories, at the end of every tick."""
    from sidestream.engine.tick import Fed, Machine

    stages = stages_of(row(5), torch.zeros(2, 5).double())
    rule = Exact(nn.functional.mse_loss)
    machine = Machine(rule.attach(pipelined(stages)), rule)
    most = [0] * 5
    for tick, (x, y) in enumerate(random_pairs(0, 30)):
        machine.feed([x, y], Fed(tick, 0.0, 0.0, None))
        for cell in machine.cells:
            machine.fire(cell)
        most = [max(m, sum(k.done is not None for k in c.memory.ticks)) for m, c in zip(most, machine.cells)]
    assert most == [2 * (5 - i) for i in range(1, 6)]  # and one more while the stage is at work


def pipedream(modules: list[nn.Module], pairs: list, lr: float, *, stashes: bool) -> list[Tensor]:
    """Per-tick steps of a row, written down: stage i goes back on frame f in tick f + (K-1) + (K-i), on the weights of
    the forward pass (tick f + i - 1) or on those of that tick; in a tick the forward comes first."""
    K, weights = len(modules), [[m[0].weight.detach().clone(), m[0].bias.detach().clone()] for m in modules]
    inputs: list[dict[int, Tensor]] = [{} for _ in range(K + 1)]
    stash: list[dict[int, list[Tensor]]] = [{} for _ in range(K)]
    cotangents: list[dict[int, Tensor]] = [{} for _ in range(K)]
    inputs[0] = {f: x for f, (x, _) in enumerate(pairs)}
    for tick in range(len(pairs) + 2 * K):
        for i in reversed(range(K)):
            if (f := tick - i) in inputs[i]:
                stash[i][f] = [w.clone() for w in weights[i]]
                inputs[i + 1][f] = torch.tanh(inputs[i][f] @ weights[i][0].T + weights[i][1])
            f = tick - (K - 1) - (K - 1 - i)
            if not 0 <= f < len(pairs):
                continue
            used = [w.clone().requires_grad_() for w in (stash[i][f] if stashes else weights[i])]
            x = inputs[i][f].clone().requires_grad_()
            out = torch.tanh(x @ used[0].T + used[1])
            if i == K - 1:
                cotangents[i][f] = 2 * (out.detach() - pairs[f][1]) / out.numel()
            g0, g1, gx = torch.autograd.grad(out, [*used, x], cotangents[i][f])
            if i:
                cotangents[i - 1][f] = gx
            weights[i] = [weights[i][0] - lr * g0, weights[i][1] - lr * g1]
    return [w for ws in weights for w in ws]


@pytest.mark.parametrize("executor", ["inline", "threads"])
@pytest.mark.parametrize("keep", KEEP[1:])
def test_steps_in_every_tick_equal_a_hand_written_pipedream(keep: str, executor: str) -> None:
    modules, pairs = row(4), random_pairs(2, 12)
    expected = pipedream(modules, pairs, 0.3, stashes=keep == "inputs and weights")
    other = pipedream(modules, pairs, 0.3, stashes=keep != "inputs and weights")
    rule = Exact(
        nn.functional.mse_loss, optimizers=functools.partial(torch.optim.SGD, lr=0.3), update="tick", keep=keep
    )
    list(run(pipelined(stages_of(modules, pairs[0][0])), pairs, rule=rule, executor=executor))
    found = [p.detach() for m in modules for p in m.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    assert max((a - b).abs().max() for a, b in zip(expected, other)) > 1e-5  # or the two would be one


def recurrent_chain() -> Chain:
    first = PerFrame(nn.Conv2d(3, 4, 3, padding=1))
    return Chain(first, ConvGRU(4, 4), PerFrame(nn.Tanh()), ConvGRU(4, 2)).double()


def swallowing_chain() -> Chain:
    """Looks back, and answers every second frame."""
    strided = CausalConv3d(4, 4, 3, stride=(2, 1, 1), padding=1)
    return Chain(PerFrame(nn.Conv2d(3, 4, 3, padding=1)), strided, PerFrame(nn.Tanh()), ConvGRU(4, 2)).double()


def clip_and_targets() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    clip = torch.randn(7, 2, 3, 4, 4, dtype=torch.float64, generator=generator)
    return clip, torch.randn(7, 2, 2, 4, 4, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("make", [recurrent_chain, swallowing_chain])
@pytest.mark.parametrize("keep", KEEP)
def test_state_is_carried_without_a_gradient(keep: str, make: Callable[[], Chain]) -> None:
    """Against the chain stepped frame by frame, with each layer's state detached between frames."""
    torch.manual_seed(0)
    chain = make()
    clip, targets = clip_and_targets()
    state, losses = chain.init_state(clip[0]), []
    for x, y in zip(clip, targets):
        answer, state = chain.step(x, state)
        state = pytree.tree_map(lambda s: s.detach() if isinstance(s, Tensor) else s, state)
        losses += [] if answer is NOTHING else [nn.functional.mse_loss(answer, y)]
    true = torch.autograd.grad(torch.stack(losses).mean(), list(chain.parameters()))
    by_parameter = dict(zip(chain.parameters(), true))
    stages = cut(chain, clip[0], num_stages=4, costs="uniform")
    rule = Exact(nn.functional.mse_loss, keep=keep)
    outputs = list(run(pipelined(stages), list(zip(clip, targets)), rule=rule, executor="threads"))
    torch.testing.assert_close([o.loss for o in outputs], [loss.item() for loss in losses], rtol=1e-12, atol=0)
    for number, stage in enumerate(stages, start=1):
        found = rule.gradients(number)
        for name, parameter in stage.module.named_parameters():
            torch.testing.assert_close(found[name], by_parameter[parameter], rtol=1e-9, atol=1e-13)


class Small(nn.Module):
    def __init__(self, *, norm: bool = False, dropout: bool = False) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.b = nn.Conv2d(6, 6, 3, padding=1)
        self.dropout = nn.Dropout(0.5) if dropout else nn.Identity()
        self.c = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.norm(self.a(x)), inplace=True)
        x = self.dropout(torch.relu(self.b(x))) + x
        return self.c(x.mean((2, 3)))


def frames_and_labels(num_frames: int) -> list[tuple[Tensor, Tensor]]:
    frames = torch.randn(num_frames, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [(frame, torch.tensor([1, 3])) for frame in frames]


def gradients_by_parameter(rule: Exact, stages: Stages) -> dict[nn.Parameter, Tensor]:
    return {
        parameter: rule.gradients(number)[name]
        for number, stage in enumerate(stages, start=1)
        for name, parameter in stage.module.named_parameters()
    }


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("executor", ["inline", "threads"])
def test_a_model_that_was_cut_trains_its_own_parameters(norm: bool, executor: str) -> None:
    """Batch norm in train mode included: it takes the statistics of each frame, and counts each once."""
    torch.manual_seed(0)
    model, pairs = Small(norm=norm).double().train(), frames_and_labels(5)
    loss = nn.functional.cross_entropy
    stages = cut(model, pairs[0][0], num_stages=4, costs="uniform")
    rule = Exact(loss)
    list(run(pipelined(stages), pairs, rule=rule, executor=executor))
    if norm:
        assert model.norm.num_batches_tracked == 5
        found_mean = model.norm.running_mean.clone()
        model.norm.reset_running_stats()
    true = torch.autograd.grad(torch.stack([loss(model(x), y) for x, y in pairs]).mean(), list(model.parameters()))
    found = gradients_by_parameter(rule, stages)
    assert set(found) == set(model.parameters())
    for parameter, gradient in zip(model.parameters(), true, strict=True):
        # a bias before batch norm has a gradient of rounding errors only
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-9, atol=1e-13)
    if norm:
        torch.testing.assert_close(found_mean, model.norm.running_mean, rtol=1e-12, atol=0)


def test_dropout_in_train_mode_is_dropout() -> None:
    """Half of what the second stage writes is dropped: losses differ from frame to equal frame, in eval mode not."""
    pair = frames_and_labels(1)[0]
    for training in (True, False):
        torch.manual_seed(0)
        model = Small(dropout=True).double().train(training)
        stages = cut(model, pair[0], num_stages=3, costs="uniform")
        outputs = run(pipelined(stages), [pair] * 4, rule=Exact(nn.functional.cross_entropy), executor="inline")
        assert len({o.loss for o in outputs}) == (4 if training else 1)


@pytest.mark.parametrize(("option", "what"), [("norm", "updates statistics"), ("dropout", "draws random numbers")])
def test_what_a_second_forward_would_not_repeat_is_refused(option: str, what: str) -> None:
    pairs = frames_and_labels(2)
    by_hand = stages_of([Small(**{option: True}).double()], pairs[0][0])
    for stages in (cut(Small(**{option: True}).double(), pairs[0][0], num_stages=2, costs="uniform"), by_hand):
        with pytest.raises(CircuitError, match=what):
            run(pipelined(stages), pairs, rule=Exact(nn.functional.cross_entropy, keep="inputs"))


def test_updates_on_a_kept_graph_are_refused() -> None:
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    with pytest.raises(InputError, match="changes weights that a kept graph still needs"):
        Exact(nn.functional.mse_loss, optimizers=sgd, update="tick")
    with pytest.raises(InputError, match="keep = 'nothing'; expected one of 'graph', 'inputs'"):
        Exact(nn.functional.mse_loss, keep="nothing")


def test_threads_equals_inline_to_the_bit() -> None:
    """Weights after several optimiser steps on a random circuit with skips."""
    for seed, keep, update in [(0, "graph", "clip"), (1, "inputs", "tick"), (2, "inputs and weights", 3)]:
        weights = []
        for executor in ("inline", "threads"):
            stages = random_modules(seed, 6)
            adam = functools.partial(torch.optim.AdamW, lr=0.02)
            rule = Exact(squared_error, optimizers=adam, update=update, keep=keep)
            for clip in range(3):
                list(run(parallel(stages), random_pairs(clip, 6), rule=rule, executor=executor, num_threads=3))
            weights.append([list(stage.module.parameters()) for stage in stages])
        assert_equal(weights[1], weights[0], f"{keep}, {update}")


def test_the_slow_twin_is_the_model_where_ages_do_not_mix() -> None:
    stages, pairs = random_modules(4, 5), random_pairs(4, 3)
    by_model = torch.stack([squared_error(stages(x), y) for x, y in pairs]).mean()
    torch.testing.assert_close(mean_loss(pipelined(stages), pairs, squared_error), by_model)
