"""Gradients through the state of a stage: autograd's own of the truncated circuit, which is written down here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from contract import assert_equal
from random_circuits import Mixing, random_pairs, random_stages
from sidestream.circuit.ages import latency_ticks
from sidestream.circuit.cut import cut
from sidestream.circuit.stage import Stage, Stages
from sidestream.circuit.wire import Circuit
from sidestream.circuit.wiring import parallel, pipelined, semi_parallel, sequential
from sidestream.engine import run
from sidestream.engine.rules.exact import KEEP, Exact
from sidestream.engine.rules.sideways import Sideways
from sidestream.engine.rules.training import StageGradient, TrainingRule
from sidestream.engine.tick import Fed, Machine
from sidestream.errors import CircuitError, InputError
from sidestream.nn.combine import Chain, PerFrame
from sidestream.nn.conv3d import CausalConv3d
from sidestream.nn.recurrent import GRU, LSTM, ConvGRU, ConvLSTM
from sidestream.types import NOTHING

WIRINGS = {
    "sequential": sequential,
    "pipelined": pipelined,
    "parallel": parallel,
    "semi": lambda stages: semi_parallel(stages, groups=(len(stages) + 1) // 2),
}
mse = nn.functional.mse_loss


def detached(state: Any) -> Any:
    return pytree.tree_map(lambda s: s.detach() if isinstance(s, Tensor) else s, state)


def stepped(stage: Stage, inputs: tuple[Any, ...], state: Any) -> tuple[tuple[Any, ...], Any]:
    """A stage that is given nothing writes nothing, and its state stays."""
    if any(x is NOTHING for x in inputs):
        return (NOTHING,) * stage.num_outputs, state
    return getattr(stage.step, "with_gradients", stage.step)(inputs, state)


def truncated_loss(circuit: Circuit, pairs: Sequence[tuple[Any, Any]], loss: Any, num_ticks: int) -> Tensor:
    """What a stage writes in tick t, as a function of its inputs of the last ``num_ticks`` + 1 ticks and a constant."""
    latency, last = latency_ticks(circuit), len(pairs) - 1

    def start(stage: Stage) -> Any:
        return stage.init_state() if stage.init_state else None

    @cache
    def value(number: int, tick: int) -> tuple[tuple[Any, ...], Any]:
        """Outputs and state after the tick, without a graph."""
        stage = circuit.stages[number - 1]
        inputs = tuple(
            source(tick - w.delay)[w.output] if w.source == 0 else plain(w.source, tick - w.delay)[w.output]
            for w in circuit.wires_into(number)
        )
        with torch.no_grad():
            return stepped(stage, inputs, state_before(number, tick))

    def state_before(number: int, tick: int) -> Any:
        return value(number, tick - 1)[1] if tick > 0 else start(circuit.stages[number - 1])

    def source(tick: int) -> tuple[Any, ...]:
        if tick < 0:
            return (NOTHING,) * 9
        given = pairs[min(tick, last)][0]
        return tuple(given) if isinstance(given, tuple) else (given,)

    def plain(number: int, tick: int) -> tuple[Any, ...]:
        return (NOTHING,) * 9 if tick < 0 else value(number, tick)[0]

    @cache
    def written(number: int, tick: int) -> tuple[Any, ...]:
        if number == 0 or tick < 0:
            return source(tick) if number == 0 else (NOTHING,) * 9
        stage, outputs = circuit.stages[number - 1], ()
        first = max(0, tick - num_ticks)
        state = detached(state_before(number, first))
        for t in range(first, tick + 1):
            outputs, state = stepped(stage, read(number, t), state)
        return outputs

    def read(number: int, tick: int) -> tuple[Any, ...]:
        return tuple(written(w.source, tick - w.delay)[w.output] for w in circuit.wires_into(number))

    losses = []
    for t, (_, target) in enumerate(pairs):
        leaves = read(circuit.sink, t + latency)
        if not any(leaf is NOTHING for leaf in leaves):
            losses.append(loss(pytree.tree_unflatten(leaves, circuit.out_spec), target))
    return torch.stack(losses).mean()


def assert_is_gradient_of(rule: TrainingRule, stages: Sequence[Stage], value: Tensor) -> None:
    for number, stage in enumerate(stages, start=1):
        found, parameters = rule.gradients(number), dict(stage.module.named_parameters())
        if not parameters:
            continue
        true = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
        assert set(found) == {name for name, g in zip(parameters, true, strict=True) if g is not None}
        for name, gradient in zip(parameters, true, strict=True):
            if gradient is not None:  # float64 sums in another order
                torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-13, msg=f"stage {number} {name}")


def remembering_stages(seed: int, depth: int) -> Stages:
    """Random links; about two stages in three mix an older state of theirs in, and leave a mixture behind."""
    drawn = random_stages(seed, depth)
    return drawn.with_stages(tuple(_remembering(seed * 100 + n, s, (seed + n) % 3 > 0) for n, s in enumerate(drawn)))


def _remembering(seed: int, like: Stage, has_state: bool) -> Stage:
    module = Mixing(seed, like.num_inputs + has_state, like.num_outputs)

    def step(inputs: tuple[Any, ...], state: Any) -> tuple[tuple[Any, ...], Any]:
        outputs = module(*inputs, state) if has_state else module(*inputs)
        return outputs, 0.7 * state + outputs[0] if has_state else None

    init = (lambda: torch.full((2, 5), 0.3, dtype=torch.float64)) if has_state else None
    return Stage(like.name, step, like.num_inputs, like.num_outputs, init_state=init, module=module)


def squared_error(answer: tuple[Tensor, ...], target: Tensor) -> Tensor:
    return torch.stack([((a - target) ** 2).mean() for a in answer]).sum()


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.integers(1, 7),
    st.integers(0, 8),
    st.sampled_from(sorted(WIRINGS)),
    st.sampled_from(KEEP),
    st.sampled_from(["inline", "threads"]),
)
def test_exact_is_autograd_of_the_truncated_circuit(
    seed: int, depth: int, num_frames: int, num_ticks: int, wiring: str, keep: str, executor: str
) -> None:
    circuit, pairs = WIRINGS[wiring](remembering_stages(seed, depth)), random_pairs(seed, num_frames)
    rule = Exact(squared_error, keep=keep, state_ticks=num_ticks)
    outputs = list(run(circuit, pairs, rule=rule, executor=executor))
    assert [o.frame_index for o in outputs] == list(range(num_frames))
    expected = truncated_loss(circuit, pairs, squared_error, num_ticks)
    torch.testing.assert_close(sum(o.loss for o in outputs) / num_frames, expected.item(), rtol=1e-12, atol=0)
    assert_is_gradient_of(rule, circuit.stages, expected)


def maps() -> Chain:
    first = PerFrame(nn.Conv2d(3, 4, 3, padding=1))
    return Chain(first, ConvGRU(4, 4), CausalConv3d(4, 4, 3, padding=1), ConvLSTM(4, 2)).double()


def features() -> Chain:
    return Chain(PerFrame(nn.Flatten()), LSTM(48, 4), GRU(4, 3), PerFrame(nn.Linear(3, 2))).double()


def swallowing() -> Chain:
    """Answers every second frame."""
    strided = CausalConv3d(3, 4, 3, stride=(2, 1, 1), padding=1)
    return Chain(ConvGRU(3, 3), strided, PerFrame(nn.Tanh()), ConvGRU(4, 2)).double()


def clip_of(chain: Chain, num_frames: int = 7) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    clip = torch.randn(num_frames, 2, 3, 4, 4, dtype=torch.float64, generator=generator)
    like = chain.blank(clip[0])
    return clip, [torch.randn(like.shape, dtype=torch.float64, generator=generator) for _ in clip]


@pytest.mark.parametrize("num_ticks", [0, 1, 3, 50])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("make", [maps, features, swallowing])
def test_exact_on_streaming_layers(make: Callable[[], Chain], num_stages: int, num_ticks: int) -> None:
    torch.manual_seed(0)
    chain = make()
    clip, targets = clip_of(chain)
    stages = cut(chain, clip[0], num_stages=num_stages, costs="uniform")
    pairs = list(zip(clip, targets, strict=True))
    rule = Exact(mse, state_ticks=num_ticks)
    list(run(pipelined(stages), pairs, rule=rule, executor="inline"))
    assert_is_gradient_of(rule, stages.stages, truncated_loss(pipelined(stages), pairs, mse, num_ticks))
    if num_ticks < len(clip):
        return
    answers_BTX = chain(clip.transpose(0, 1))  # back-propagation through time, on the clip form
    answered = targets[:: chain.period_ticks]
    bptt = torch.stack([mse(a, y) for a, y in zip(answers_BTX.unbind(1), answered, strict=True)]).mean()
    assert_is_gradient_of(rule, stages.stages, bptt)


def cell_row(num_stages: int, seed: int = 0) -> list[Stage]:
    """Recurrent stages h' = tanh(x W + h U), each writing its state."""

    def stage(number: int) -> Stage:
        generator = torch.Generator().manual_seed(seed * 10 + number)
        module = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(5, 5, generator=generator, dtype=torch.float64) / 2) for name in "WU"}
        )

        def step(inputs: tuple[Any, ...], state: Tensor) -> tuple[tuple[Any, ...], Tensor]:
            hidden = torch.tanh(inputs[0] @ module["W"] + state @ module["U"])
            return (hidden,), hidden

        return Stage(f"s{number}", step, 1, 1, init_state=lambda: ZERO, module=module)

    return [stage(n) for n in range(num_stages)]


ZERO = torch.zeros(2, 5, dtype=torch.float64)


def row_circuit(stages: list[Stage]) -> Circuit:
    like = random_stages(0, len(stages), skip_chance=0.0)
    links = tuple(type(like.links[0])(n, 0, n + 1, 0) for n in range(len(stages) + 1))
    spec = pytree.tree_structure(ZERO)
    return pipelined(Stages(tuple(stages), links, pytree.tree_structure(((ZERO,), {})), spec))


def cell(x: Tensor, h: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return torch.tanh(x @ weights[0] + h @ weights[1])


def weights_of(stages: list[Stage]) -> list[list[Tensor]]:
    return [[s.module[name].detach().clone() for name in "WU"] for s in stages]


def window_gradient(
    inputs: dict[int, Tensor],
    states: dict[int, Tensor],
    weights: Sequence[Tensor],
    span: range,
    seed: Callable[[Tensor], Tensor],
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Gradients in the weights and in each input of the steps of ``span``, state before them held constant."""
    used = [w.clone().requires_grad_() for w in weights]
    xs = {t: inputs[t].clone().requires_grad_() for t in span}
    hidden = states[span[0]]
    for t in span:
        hidden = cell(xs[t], hidden, used)
    found = torch.autograd.grad(hidden, [*used, *xs.values()], seed(hidden.detach()))
    return list(found[:2]), dict(zip(xs, found[2:], strict=True))


def sideways_by_hand(stages: list[Stage], pairs: list, lr: float, num_ticks: int, loss_delay: int) -> list[Tensor]:
    """A step in every tick with a gradient. In a tick each stage reads what was written, and sent, a tick earlier."""
    K, weights = len(stages), weights_of(stages)
    inputs: list[dict[int, Tensor]] = [{} for _ in range(K)]
    states: list[dict[int, Tensor]] = [{} for _ in range(K)]
    hidden, cotangent = [ZERO] * K, [None] * K
    for tick in range(len(pairs) + K - 1):
        outputs, sent = list(hidden), [None] * K
        for i in range(K):
            frame = tick - i
            if not 0 <= frame < len(pairs):
                continue
            inputs[i][tick] = pairs[frame][0] if i == 0 else hidden[i - 1]
            states[i][tick] = hidden[i]
            outputs[i] = cell(inputs[i][tick], hidden[i], weights[i])
            target = pairs[frame][1]
            span = range(max(i, tick - num_ticks), tick + 1)
            if i == K - 1 and not loss_delay:  # the loss is that of the steps gone through again
                gs, gx = window_gradient(
                    inputs[i], states[i], weights[i], span, lambda h, y=target: 2 * (h - y) / h.numel()
                )
            elif cotangent[i] is not None:
                gs, gx = window_gradient(inputs[i], states[i], weights[i], span, lambda h, c=cotangent[i]: c)
                cotangent[i] = None
            else:
                continue
            weights[i] = [w - lr * g for w, g in zip(weights[i], gs, strict=True)]
            if i:
                sent[i - 1] = gx[tick]
        if loss_delay and 0 <= tick - (K - 1) < len(pairs):
            sent[K - 1] = 2 * (outputs[K - 1] - pairs[tick - (K - 1)][1]) / ZERO.numel()
        hidden = outputs
        cotangent = [new if new is not None else old for new, old in zip(sent, cotangent, strict=True)]
    return [w for ws in weights for w in ws]


@pytest.mark.parametrize("loss_delay", [0, 1])
@pytest.mark.parametrize("num_ticks", [0, 1, 4, 100])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_sideways_equals_one_by_hand(num_stages: int, num_ticks: int, loss_delay: int) -> None:
    """Weights after a step in every tick, so that the weights change between a window's steps."""
    stages, pairs = cell_row(num_stages), random_pairs(4, 12)
    expected = sideways_by_hand(stages, pairs, 0.3, num_ticks, loss_delay)
    shorter = sideways_by_hand(stages, pairs, 0.3, max(0, num_ticks - 1), loss_delay)
    rule = Sideways(
        mse,
        optimizers=functools.partial(torch.optim.SGD, lr=0.3),
        state_ticks=num_ticks,
        loss_delay=loss_delay,
    )
    list(run(row_circuit(stages), pairs, rule=rule, executor="threads", num_threads=2))
    found = [w for ws in weights_of(stages) for w in ws]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    if 0 < num_ticks < 12:
        assert max((a - b).abs().max() for a, b in zip(expected, shorter, strict=True)) > 1e-6


def pipedream(stages: list[Stage], pairs: list, lr: float, num_ticks: int, *, stashes: bool) -> list[Tensor]:
    """Stage i goes back on frame f in tick f + (K-1) + (K-1-i), and ``num_ticks`` later for each stage behind it."""
    K, T, weights = len(stages), len(pairs), weights_of(stages)
    inputs: list[dict[int, Tensor]] = [{} for _ in range(K + 1)]
    states: list[dict[int, Tensor]] = [{0: ZERO} for _ in range(K)]
    stash: list[dict[int, list[Tensor]]] = [{} for _ in range(K)]
    cotangents: list[dict[int, Tensor]] = [{f: torch.zeros_like(ZERO) for f in range(T)} for _ in range(K)]
    inputs[0] = {f: x for f, (x, _) in enumerate(pairs)}
    for tick in range(T + 2 * K + K * num_ticks):
        for i in reversed(range(K)):
            if 0 <= (f := tick - i) < T:
                stash[i][f] = weights[i]
                inputs[i + 1][f] = states[i][f + 1] = cell(inputs[i][f], states[i][f], weights[i])
            f = tick - (K - 1) - (K - 1 - i) - num_ticks * (K - 1 - i)
            if not 0 <= f < T:
                continue
            used = stash[i][f] if stashes else weights[i]
            seed = (lambda h, y=pairs[f][1]: 2 * (h - y) / h.numel()) if i == K - 1 else lambda h, c=cotangents[i][f]: c
            gs, gx = window_gradient(inputs[i], states[i], used, range(max(0, f - num_ticks), f + 1), seed)
            for r, g in gx.items():
                cotangents[i - 1][r] = cotangents[i - 1][r] + g
            weights[i] = [w - lr * g for w, g in zip(weights[i], gs, strict=True)]
    return [w for ws in weights for w in ws]


@pytest.mark.parametrize("keep", KEEP[1:])
@pytest.mark.parametrize(("num_stages", "num_ticks"), [(1, 2), (3, 1), (3, 4)])
def test_exact_with_steps_in_every_tick_equals_one_by_hand(num_stages: int, num_ticks: int, keep: str) -> None:
    stages, pairs = cell_row(num_stages), random_pairs(5, 10)
    expected = pipedream(stages, pairs, 0.3, num_ticks, stashes=keep == "inputs and weights")
    sgd = functools.partial(torch.optim.SGD, lr=0.3)
    rule = Exact(mse, optimizers=sgd, update="tick", keep=keep, state_ticks=num_ticks)
    list(run(row_circuit(stages), pairs, rule=rule, executor="threads", num_threads=2))
    found = [w for ws in weights_of(stages) for w in ws]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_sideways_keeps_n_inputs_however_long_the_stream() -> None:
    stages = cell_row(3)
    rule = Sideways(mse, state_ticks=4)
    machine = Machine(rule.attach(row_circuit(stages)), rule)
    for tick, (x, y) in enumerate(random_pairs(0, 40)):
        machine.feed([x, y], Fed(tick, 0.0, 0.0, None))
        for each in machine.cells:
            machine.fire(each)
    assert [len(each.memory.window) for each in machine.cells] == [5, 5, 5]  # the newest among them


def test_every_gradient_of_exact_is_taken_at_its_own_frame() -> None:
    records: list[StageGradient] = []
    rule = Exact(mse, state_ticks=2, observe=records.append)
    list(run(row_circuit(cell_row(3)), random_pairs(1, 6), rule=rule, executor="inline"))
    assert sorted((r.stage, r.input_frame) for r in records) == [(i, f) for i in range(1, 4) for f in range(6)]
    assert all(r.cotangent_frame == r.input_frame for r in records if r.stage == 3)
    # what a stage in the middle gets for its frame f is about the losses of the frames f to f + 2, of which f is first
    assert all(r.age_gap == 0 for r in records)


def test_threads_equals_inline_to_the_bit() -> None:
    options = [
        (Exact, {"keep": "inputs and weights", "update": "tick"}),
        (Exact, {"keep": "graph", "update": "clip"}),
        (Sideways, {"update": "tick"}),
        (Sideways, {"update": 3}),
    ]
    for rule_class, chosen in options:
        weights = []
        for executor in ("inline", "threads"):
            stages = remembering_stages(8, 5)
            adam = functools.partial(torch.optim.AdamW, lr=0.02)
            rule: Any = rule_class(squared_error, optimizers=adam, state_ticks=2, **chosen)
            for clip in range(3):
                list(run(parallel(stages), random_pairs(clip, 6), rule=rule, executor=executor, num_threads=3))
            weights.append([list(stage.module.parameters()) for stage in stages])
        assert_equal(weights[1], weights[0], f"{rule_class.__name__} {chosen}")


class Normed(nn.Module):
    """A batch norm behind a recurrence, in one stage with it."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(3), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(x)).tanh()


@pytest.mark.parametrize("rule_class", [Exact, Sideways])
def test_going_forward_again_does_not_count_a_frame_twice(rule_class: Any) -> None:
    """Batch norms in train mode normalise by the frame at hand, both times; statistics are those of one pass."""
    torch.manual_seed(0)
    chain = Chain(ConvGRU(3, 3), PerFrame(Normed()), ConvGRU(3, 2)).double()
    norm = chain.layers[1].module.norm
    clip, targets = clip_of(chain)
    pairs = list(zip(clip, targets, strict=True))
    stages = cut(chain, clip[0], num_stages=1, costs="uniform")
    rule = rule_class(mse, state_ticks=20, update="clip")
    norm.reset_running_stats()
    list(run(pipelined(stages), pairs, rule=rule, executor="inline"))
    counted = {name: value.clone() for name, value in norm.named_buffers()}
    assert counted["num_batches_tracked"] == len(clip)
    norm.reset_running_stats()
    state, losses = chain.init_state(clip[0]), []
    for x, y in pairs:
        answer, state = chain.step(x, state)
        losses.append(mse(answer, y))
    for name, value in norm.named_buffers():
        torch.testing.assert_close(counted[name], value, rtol=1e-12, atol=0)
    assert_is_gradient_of(rule, stages.stages, torch.stack(losses).mean())  # one stage: Sideways waits for nothing


@pytest.mark.parametrize("rule_class", [Exact, Sideways])
def test_refusals(rule_class: Any) -> None:
    chain = Chain(ConvGRU(3, 3), PerFrame(Normed(dropout=0.5)), PerFrame(nn.Dropout(0.5))).double()
    clip, targets = clip_of(chain)
    pairs = list(zip(clip, targets, strict=True))
    one = pipelined(cut(chain, clip[0], num_stages=1, costs="uniform"))
    with pytest.raises(CircuitError, match=r"stage 1 .* draws random numbers \(dropout\).*use state_ticks=0"):
        run(one, pairs, rule=rule_class(mse, state_ticks=1))
    list(run(one, pairs, rule=rule_class(mse), executor="inline"))
    apart = pipelined(cut(chain, clip[0], num_stages=3, costs="uniform"))  # a stage without state does not go again
    list(run(apart, pairs, rule=rule_class(mse, state_ticks=1), executor="inline"))
    for wrong in (-1, 1.5, True):
        with pytest.raises(InputError, match=r"state_ticks = .*expected a number of ticks from 0 on"):
            rule_class(mse, state_ticks=wrong)
