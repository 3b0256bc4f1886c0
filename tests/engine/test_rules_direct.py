"""Direct feedback alignment on circuits: Nøkland's formula by parameter, the ticks and ages derived, both executors."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from contract import assert_equal
from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.cut import cut
from sidestream.circuit.wiring import parallel, pipelined, sequential
from sidestream.engine import run
from sidestream.engine.rules.direct import DirectFeedback
from sidestream.engine.rules.exact import Exact
from sidestream.engine.rules.sideways import Sideways
from sidestream.engine.rules.training import StageGradient
from sidestream.errors import CircuitError, InputError
from sidestream.nn.feedback_weights import Draw

EXECUTORS = ("inline", "threads")
BATCH, WIDTH = 3, 5
TIGHT = {"rtol": 1e-10, "atol": 1e-13}
"""float64; sums in another order."""


def half_squared_error(answer: Tensor, target: Tensor) -> Tensor:
    return 0.5 * ((answer - target) ** 2).sum()


def row(num_stages: int, seed: int = 0) -> list[nn.Module]:
    """tanh(W h + b) of growing width, so that a B of the wrong stage would not fit."""
    torch.manual_seed(seed)
    widths = range(WIDTH, WIDTH + num_stages)
    return [nn.Sequential(nn.Linear(n, n + 1), nn.Tanh()).double() for n in widths]


def moving(num_stages: int, num_frames: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    chance = torch.Generator().manual_seed(seed)
    sizes = [WIDTH, WIDTH + num_stages]
    return [
        tuple(torch.randn(BATCH, n, generator=chance, dtype=torch.float64) for n in sizes)  # type: ignore[misc]
        for _ in range(num_frames)
    ]


def feedback(modules: list[nn.Module], seed: int) -> list[Tensor]:
    """B_1 .. B_(K-1), as the rule draws them."""
    num_errors = modules[-1][0].out_features  # type: ignore[index]
    sizes = [m[0].out_features for m in modules[:-1]]  # type: ignore[index]
    like = torch.zeros(1, dtype=torch.float64)
    return [Draw(seed)(f"stage {n}, output 0", (size, num_errors), size, like) for n, size in enumerate(sizes, start=1)]


@torch.no_grad()
def outputs_of(modules: list[nn.Module], x: Tensor) -> list[Tensor]:
    """h_0 .. h_K in plain matrices."""
    made = [x]
    for module in modules:
        linear = module[0]  # type: ignore[index]
        made.append(torch.tanh(made[-1] @ linear.weight.T + linear.bias))
    return made


@torch.no_grad()
def nokland(
    modules: list[nn.Module], stage: int, x: Tensor, error: Tensor, matrices: list[Tensor]
) -> dict[str, Tensor]:
    """dW_i = ((B_i e) * (1 - h_i^2))^T h_(i-1), db_i its sum; with e itself for the last stage."""
    made = outputs_of(modules, x)
    sent = error if stage == len(modules) else error @ matrices[stage - 1].T
    delta = sent * (1 - made[stage] ** 2)
    return {"0.weight": delta.T @ made[stage - 1], "0.bias": delta.sum(0)}


def error_of(modules: list[nn.Module], pair: tuple[Tensor, Tensor]) -> Tensor:
    return outputs_of(modules, pair[0])[-1] - pair[1]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **TIGHT, msg=lambda text, name=name: f"{name}: {text}")


def records_of(modules: list[nn.Module], pairs: list, *, executor: str = "inline", **options) -> list[StageGradient]:
    records: list[StageGradient] = []
    rule = DirectFeedback(half_squared_error, observe=records.append, **options)
    outputs = list(run(pipelined(stages_of(modules, pairs[0][0])), pairs, rule=rule, executor=executor))
    assert [o.frame_index for o in outputs] == list(range(len(pairs)))
    return sorted(records, key=lambda r: (r.tick, r.stage))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("keep", ["graph", "inputs"])
@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_kept_inputs_give_nøklands_formula_frame_by_frame(depth: int, keep: str, executor: str) -> None:
    modules, pairs = row(depth), moving(depth, 7)
    matrices = feedback(modules, seed=4)
    records = records_of(modules, pairs, keep=keep, update="manual", seed=4, executor=executor)
    assert sorted((r.stage, r.input_frame) for r in records) == [(i, f) for i in range(1, depth + 1) for f in range(7)]
    for r in records:
        assert r.age_gap == 0
        assert r.tick == (depth - 1 + r.input_frame if r.stage == depth else depth + r.input_frame)
        x = pairs[r.input_frame][0]
        assert_same(r.gradients, nokland(modules, r.stage, x, error_of(modules, pairs[r.cotangent_frame]), matrices))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("loss_delay", [0, 1])
@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_the_newest_input_and_the_newest_error(depth: int, loss_delay: int, executor: str) -> None:
    """In tick t stage i works on frame t - i + 1, and has the error of the answer of tick t - 1: of frame t - K."""
    modules, pairs = row(depth), moving(depth, depth + 6)
    matrices = feedback(modules, seed=4)
    records = records_of(modules, pairs, seed=4, loss_delay=loss_delay, executor=executor)
    expected = []
    for tick in range(len(pairs) + depth - 1):
        for stage in range(1, depth + 1):
            frame, about = tick - stage + 1, tick - depth + (stage == depth and not loss_delay)
            if 0 <= frame < len(pairs) and about >= 0:
                expected.append((tick, stage, frame, about))
    assert [(r.tick, r.stage, r.input_frame, r.cotangent_frame) for r in records] == expected
    for r in records:
        error = error_of(modules, pairs[r.cotangent_frame])
        assert_same(r.gradients, nokland(modules, r.stage, pairs[r.input_frame][0], error, matrices))


@pytest.mark.parametrize("loss_delay", [0, 1])
@pytest.mark.parametrize("depth", [2, 3, 5, 8])
def test_age_gaps_on_a_moving_video(depth: int, loss_delay: int) -> None:
    """K - i + 1 for the stages that the error goes to; under Sideways it is 2 (K - i)."""
    records = records_of(row(depth), moving(depth, 2 * depth + 6), loss_delay=loss_delay, executor="threads")
    expected = {(i, depth - i + 1) for i in range(1, depth)} | {(depth, loss_delay)}
    assert {(r.stage, r.age_gap) for r in records} == expected


@pytest.mark.parametrize("depth", [2, 3, 5, 8])
def test_a_still_video_gives_the_formula_from_tick_K_on(depth: int) -> None:
    modules, pairs = row(depth), moving(depth, 1) * (2 * depth)
    matrices, error = feedback(modules, seed=0), error_of(modules, pairs[0])
    records = records_of(modules, pairs)
    for number in range(1, depth + 1):
        ticks = [r.tick for r in records if r.stage == number]
        last = 2 * depth - 1 + (number - 1)
        assert ticks == list(range(depth - 1 if number == depth else depth, last + 1))
    for r in records:
        assert_same(r.gradients, nokland(modules, r.stage, pairs[0][0], error, matrices))


@pytest.mark.parametrize("keep", ["nothing", "inputs"])
def test_the_matrices_of_the_true_chain_give_backprop(keep: str) -> None:
    """In a linear net without hidden non-linearities, B_i = (W_K ... W_(i+1))^T is what backprop sends."""
    torch.manual_seed(0)
    modules = [nn.Linear(WIDTH + n, WIDTH + n + 1).double() for n in range(3)]
    pairs = moving(3, 1) * 8
    rule = DirectFeedback(half_squared_error, update="manual", keep=keep)
    circuit = pipelined(stages_of(modules, pairs[0][0]))
    list(run(circuit, pairs, rule=rule))  # draws
    chain = [(modules[2].weight @ modules[1].weight).T, modules[2].weight.T]
    for n, matrix in enumerate(chain, start=1):
        rule._feedback._drawn[f"stage {n}, output 0"].copy_(matrix.detach())
    rule.zero_gradients()
    list(run(circuit, pairs, rule=rule))
    x, y = pairs[0]
    loss = half_squared_error(modules[2](modules[1](modules[0](x))), y)
    for n, module in enumerate(modules, start=1):
        true = dict(zip(("weight", "bias"), torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)))
        assert_same(rule.gradients(n), true)


def sgd(rate: float):
    return functools.partial(torch.optim.SGD, lr=rate)


@pytest.mark.parametrize(
    ("keep", "update"),
    [("nothing", "tick"), ("nothing", 2), ("nothing", "clip"), ("inputs", "tick"), ("graph", "clip")],
)
def test_both_executors_train_to_the_same_weights_to_the_bit(keep: str, update: str | int) -> None:
    found = []
    for executor in EXECUTORS:
        modules, pairs = row(4), moving(4, 12)
        rule = DirectFeedback(half_squared_error, optimizers=sgd(0.05), keep=keep, update=update)
        circuit = pipelined(stages_of(modules, pairs[0][0]))
        losses = [o.loss for _ in range(2) for o in run(circuit, pairs, rule=rule, executor=executor)]
        found.append((losses, [p.detach() for m in modules for p in m.parameters()], rule.num_updates))
    before = [p.detach() for m in row(4) for p in m.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, found[0][1], strict=True))
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("keep", ["nothing", "graph"])
def test_a_clip_is_averaged(keep: str) -> None:
    modules, pairs = row(3), moving(3, 8)
    records: list[StageGradient] = []
    rule = DirectFeedback(half_squared_error, update="manual", keep=keep, observe=records.append)
    list(run(pipelined(stages_of(modules, pairs[0][0])), pairs, rule=rule))
    for number in (1, 2, 3):
        mine = [r.gradients["0.weight"] for r in records if r.stage == number]
        assert len(mine) == (8 if keep == "graph" else {1: 5, 2: 6, 3: 8}[number])
        torch.testing.assert_close(rule.gradients(number)["0.weight"], torch.stack(mine).mean(0), **TIGHT)


@pytest.mark.parametrize("wiring", [pipelined, sequential])
def test_maps_with_a_dense_matrix_each_and_a_cut_net(wiring) -> None:
    """B of a convolution's maps has a row for every pixel of every channel."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 9, 2))
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Tanh()), head).double()
    x, y = torch.randn(BATCH, 3, 6, 6).double(), torch.randn(BATCH, 2).double()
    for stages in (stages_of(list(net), x), cut(net, x, cut=("1",))):
        rule = DirectFeedback(half_squared_error, update="manual", keep="graph", seed=2)
        list(run(wiring(stages), [(x, y)], rule=rule))
        error = (net(x) - y).detach()
        like = torch.zeros(1, dtype=torch.float64)
        matrix = Draw(2)("stage 1, output 0", (4 * 9, 2), 4 * 9, like)
        sent = (error @ matrix.T).view(BATCH, 4, 3, 3)
        expected = torch.autograd.grad(net[0](x), net[0][0].weight, sent)[0]
        found = next(g for g in rule.gradients(1).values() if g.dim() == 4)
        torch.testing.assert_close(found, expected, **TIGHT)
        assert matrix.abs().max() <= 1 / 6


@pytest.mark.parametrize("keep", ["nothing", "inputs"])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_skip_wires_change_nothing_about_the_errors(keep: str, executor: str) -> None:
    """Each stage has B e, whoever reads it; on a still video therefore the same in each tick, skips or not."""
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Linear(5, 5), nn.Tanh()).double() for _ in range(4)]
    x, y = (torch.randn(BATCH, 5).double() for _ in range(2))
    records: list[StageGradient] = []
    rule = DirectFeedback(half_squared_error, update="manual", keep=keep, observe=records.append)
    list(run(parallel(stages_of(modules, x, skips="add")), [(x, y)] * 9, rule=rule, executor=executor))
    made = [x, modules[0](x)]
    made.append(modules[1](made[1]))
    for n in (2, 3):
        made.append(modules[n](made[-1] + made[-2]))
    error = (made[-1] - y).detach()
    assert {r.stage for r in records} == {1, 2, 3, 4}
    for number, module in enumerate(modules, start=1):
        like = torch.zeros(1, dtype=torch.float64)
        sent = error if number == 4 else error @ Draw(0)(f"stage {number}, output 0", (5, 5), 5, like).T
        inputs = made[number - 1] if number < 3 else made[number - 1] + made[number - 2]
        true = torch.autograd.grad(module(inputs.detach()), list(module.parameters()), sent)
        mine = [r for r in records if r.stage == number]
        assert len(mine) >= 5
        for r in mine:
            found = {name.removeprefix("module."): g for name, g in r.gradients.items()}
            assert_same(found, dict(zip(("0.weight", "0.bias"), true)))


@pytest.mark.parametrize("is_trained", [True, False])
def test_hidden_stages_learn_from_it(is_trained: bool) -> None:
    """The sign of a product, which the last stage alone cannot learn: loss 0.24 to 0.31 on four seeds, else 0.75 up."""
    torch.manual_seed(0)
    hidden = [nn.Sequential(nn.Linear(n, 16), nn.Tanh()) for n in (4, 16)]
    modules = [*hidden, nn.Linear(16, 1)]
    for module in hidden:
        module.requires_grad_(is_trained)
    x = torch.randn(64, 4)
    pairs = [(x, (x[:, :1] * x[:, 1:2]).sign())] * 400
    rule = DirectFeedback(nn.functional.mse_loss, optimizers=sgd(0.1))
    losses = [o.loss for o in run(pipelined(stages_of(modules, x)), pairs, rule=rule, executor="inline")]
    assert losses[0] > 0.9
    assert losses[-1] < 0.4 if is_trained else losses[-1] > 0.7


class TestRefusals:
    def circuit(self, *shape: int):
        return pipelined(stages_of(row(2), torch.zeros(*shape, dtype=torch.float64)))

    def test_options(self) -> None:
        with pytest.raises(InputError, match="keep = 'weights'; direct feedback keeps one of 'nothing'"):
            DirectFeedback(half_squared_error, keep="weights")
        with pytest.raises(InputError, match="a kept graph still needs"):
            DirectFeedback(half_squared_error, keep="graph", optimizers=sgd(0.1))
        with pytest.raises(InputError, match="distribution='cauchy'"):
            DirectFeedback(half_squared_error, distribution="cauchy")

    def test_an_answer_of_several_parts(self) -> None:
        class Two(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return x, 2 * x

        stages = cut(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), Two()), torch.zeros(1, 5), cut=("1",))
        with pytest.raises(CircuitError, match="direct feedback needs an answer that is one tensor"):
            DirectFeedback(half_squared_error).attach(pipelined(stages))

    def test_values_without_a_batch(self) -> None:
        pairs = [(torch.zeros(5).double(), torch.zeros(7).double())] * 5
        with pytest.raises(InputError, match="batch as their first axis"):
            list(run(self.circuit(5), pairs, rule=DirectFeedback(half_squared_error)))

    def test_dropout_where_inputs_are_kept(self) -> None:
        stages = stages_of([nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5)), nn.Linear(5, 5)], torch.zeros(1, 5))
        with pytest.raises(CircuitError, match=r"stage 1 .*dropout.*keep='graph' or 'nothing'"):
            DirectFeedback(half_squared_error, keep="inputs").attach(pipelined(stages))


@pytest.mark.parametrize("other", [Sideways, Exact])
def test_other_rules_send_no_such_error(other) -> None:
    """The gradients of the hidden stages differ, that of the last one does not."""
    pairs = moving(3, 1) * 7
    found = []
    for rule in (other(half_squared_error, update="manual"), DirectFeedback(half_squared_error, update="manual")):
        list(run(pipelined(stages_of(row(3), pairs[0][0])), pairs, rule=rule))
        found.append([rule.gradients(n)["0.weight"] for n in (1, 2, 3)])
    torch.testing.assert_close(found[0][2], found[1][2], **TIGHT)
    assert not torch.allclose(found[0][0], found[1][0])
    assert not torch.allclose(found[0][1], found[1][1])
