"""When stages are updated and with what: against hand computation; fill-up changes nothing; errors that teach."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract import assert_equal
from random_circuits import random_modules, random_pairs
from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.wire import Circuit
from sidestream.circuit.wiring import parallel, pipelined, with_feedback, with_periods
from sidestream.engine import run
from sidestream.engine.rules.exact import Exact
from sidestream.engine.rules.sideways import Sideways
from sidestream.engine.rules.training import StageGradient
from sidestream.errors import CircuitError, InputError, StageError
from sidestream.types import Frame

mse = nn.functional.mse_loss
RULES = (Sideways, Exact)


def row(num_stages: int, seed: int = 0) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [nn.Sequential(nn.Linear(5, 5), nn.Tanh()).double() for _ in range(num_stages)]


def circuit_of(modules: list[nn.Module]) -> Circuit:
    return pipelined(stages_of(modules, torch.zeros(2, 5, dtype=torch.float64)))


def weights_of(modules: list[nn.Module]) -> list[list[Tensor]]:
    return [[p.detach().clone() for p in m.parameters()] for m in modules]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("executor", ["inline", "threads"])
@pytest.mark.parametrize("num_frames", [1, 3, 6, 7, 8, 12])
def test_fill_up_makes_no_update(num_frames: int, executor: str) -> None:
    """Stage i gets its first gradient in its tick (K-1) + (K-i), and ticks from i-1 to T-1 + i-1: T - 2 (K-i) updates.
    Until then neither weight decay nor momentum touches it."""
    modules, K = row(4), 4
    before = weights_of(modules)
    rule = Sideways(mse, optimizers=adamw)
    outputs = list(run(circuit_of(modules), random_pairs(0, num_frames), rule=rule, executor=executor))
    assert len(outputs) == num_frames
    expected = tuple(max(0, num_frames - 2 * (K - i)) for i in range(1, K + 1))
    assert rule.num_updates == expected
    for module, old, count, optimizer in zip(modules, before, expected, rule.optimizers, strict=True):
        assert all(torch.equal(p, q) == (count == 0) for p, q in zip(module.parameters(), old, strict=True))
        assert [s["step"].item() for s in optimizer.state.values()] == [count] * (2 if count else 0)


def gathered(rule_class: type, update: int | str, num_frames: int) -> tuple[Any, list[StageGradient], list[nn.Module]]:
    modules, records = row(3), []
    rule = rule_class(mse, update=update, observe=records.append)
    list(run(circuit_of(modules), random_pairs(0, num_frames), rule=rule, executor="inline"))
    return rule, records, modules


@pytest.mark.parametrize("rule_class", RULES)
@pytest.mark.parametrize("update", ["tick", 3, "clip", "manual"])
def test_gradients_are_the_mean_over_the_ticks_of_the_last_update(rule_class: type, update: int | str) -> None:
    rule, records, modules = gathered(rule_class, update, 11)
    for number in (1, 2, 3):
        mine = [r.gradients for r in records if r.stage == number]
        last = {"tick": mine[-1:], 3: mine[: len(mine) // 3 * 3][-3:]}.get(update, mine)
        for name, found in rule.gradients(number).items():
            torch.testing.assert_close(found, torch.stack([g[name] for g in last]).mean(0), rtol=1e-12, atol=1e-15)
    rule.assign_gradients()
    assert torch.equal(modules[1][0].weight.grad, rule.gradients(2)["0.weight"])


@pytest.mark.parametrize("executor", ["inline", "threads"])
@pytest.mark.parametrize("rule_class", RULES)
def test_once_per_clip_is_one_step_with_the_mean(rule_class: type, executor: str) -> None:
    """Against the gathered gradients of the same clips with weights held still, and SGD by hand."""
    modules, rate = row(3), 0.5
    rule = rule_class(mse, optimizers=functools.partial(torch.optim.SGD, lr=rate), update="clip")
    for clip in range(3):
        pairs, records = random_pairs(clip, 9), []
        list(run(circuit_of(modules), pairs, rule=rule_class(mse, observe=records.append), executor="inline"))
        expected = []
        for number, module in enumerate(modules, start=1):
            mine = [r.gradients["0.weight"] for r in records if r.stage == number]
            assert len(mine) == (9 if rule_class is Exact else 9 - 2 * (3 - number))
            expected.append(module[0].weight.detach() - rate * torch.stack(mine).mean(0))
        list(run(circuit_with(rule, modules), pairs, rule=rule, executor=executor))
        torch.testing.assert_close([m[0].weight.detach() for m in modules], expected, rtol=1e-12, atol=1e-14)
    assert rule.num_updates == (3, 3, 3)


def circuit_with(rule: Any, modules: list[nn.Module]) -> Circuit:
    """The circuit of a rule that is used clip after clip: made once."""
    if not hasattr(rule, "circuit"):
        rule.circuit = circuit_of(modules)
    return rule.circuit


@pytest.mark.parametrize("executor", ["inline", "threads"])
def test_every_n_ticks_equals_sgd_by_hand_on_the_last_stage(executor: str) -> None:
    """K = 1, so that nothing is late: a step after frames 2, 5, 8, and across runs, with momentum."""
    modules, pairs, rate = row(1), random_pairs(0, 11), 0.3
    weight, bias = (p.detach().clone().requires_grad_() for p in modules[0].parameters())
    momentum = [torch.zeros_like(weight), torch.zeros_like(bias)]
    sums = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for n, (x, y) in enumerate(pairs, start=1):
        loss = mse(torch.tanh(x @ weight.T + bias), y)
        sums = [s + g for s, g in zip(sums, torch.autograd.grad(loss, (weight, bias)))]
        if n % 3 == 0:
            momentum = [0.9 * m + s / 3 for m, s in zip(momentum, sums)]
            with torch.no_grad():
                weight -= rate * momentum[0]
                bias -= rate * momentum[1]
            sums = [torch.zeros_like(s) for s in sums]
    rule = Sideways(mse, optimizers=functools.partial(torch.optim.SGD, lr=rate, momentum=0.9), update=3)
    circuit = circuit_of(modules)
    for part in (pairs[:4], pairs[4:]):
        list(run(circuit, part, rule=rule, executor=executor))
    assert rule.num_updates == (3,)
    torch.testing.assert_close(list(modules[0].parameters()), [weight, bias], check_layout=False, rtol=1e-12, atol=0)


def test_manual_updates_gather_over_clips() -> None:
    """Two clips of three frames, then a step: the exact rule equals one step on the mean over six frames."""
    modules, rate = row(3), 0.5
    pairs = random_pairs(0, 6)
    loss = torch.stack([mse(nn.Sequential(*modules)(x), y) for x, y in pairs]).mean()
    parameters = [p for m in modules for p in m.parameters()]
    expected = [p.detach() - rate * g for p, g in zip(parameters, torch.autograd.grad(loss, parameters))]
    rule = Exact(mse, optimizers=functools.partial(torch.optim.SGD, lr=rate), update="manual")
    circuit = circuit_of(modules)
    before = weights_of(modules)
    for part in (pairs[:3], pairs[3:]):
        list(run(circuit, part, rule=rule))
    assert_equal(weights_of(modules), before)
    rule.step()
    rule.step()  # nothing is left to step with
    torch.testing.assert_close([p.detach() for p in parameters], expected, rtol=1e-11, atol=1e-14)
    assert rule.num_updates == (1, 1, 1)


def test_max_norm_clips_each_stage() -> None:
    modules, rate, most = row(3), 0.5, 0.02
    before = weights_of(modules)
    rule = Exact(mse, optimizers=functools.partial(torch.optim.SGD, lr=rate), max_norm=most)
    list(run(circuit_of(modules), random_pairs(0, 6), rule=rule))
    for module, old in zip(modules, before, strict=True):
        change = torch.cat([(p - q).flatten() for p, q in zip(module.parameters(), old)]).norm() / rate
        torch.testing.assert_close(change, torch.tensor(most).double(), rtol=1e-4, atol=0)  # torch adds 1e-6 to norms


@pytest.mark.parametrize("rule_class", RULES)
def test_a_saved_rule_goes_on_as_if_never_stopped(rule_class: type) -> None:
    """Momentum, and what was gathered towards the next update."""
    update: Any = 4 if rule_class is Sideways else "manual"
    results = []
    for stops in (False, True):
        modules, options = row(3), {"optimizers": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)}
        rule, circuit = rule_class(mse, update=update, **options), circuit_of(modules)
        for clip in range(4):
            list(run(circuit, random_pairs(clip, 9), rule=rule))
            if clip % 2:
                rule.step()
            if stops:
                saved = rule.state_dict()
                rule = rule_class(mse, update=update, **options)
                rule.attach(circuit)
                rule.load_state_dict(saved)
        results.append((weights_of(modules), rule.num_updates))
    assert_equal(results[1], results[0])


@pytest.mark.parametrize("rule_class", RULES)
def test_a_clip_that_was_cut_short_leaves_nothing(rule_class: type) -> None:
    modules = row(3)
    rule, circuit = rule_class(mse, update="clip"), circuit_of(modules)
    with run(circuit, random_pairs(1, 9), rule=rule, executor="inline") as outputs:
        for _ in range(5):
            next(outputs)
    list(run(circuit, random_pairs(0, 9), rule=rule, executor="inline"))
    fresh = rule_class(mse, update="clip")
    list(run(circuit, random_pairs(0, 9), rule=fresh, executor="inline"))
    assert_equal([rule.gradients(i) for i in (1, 2, 3)], [fresh.gradients(i) for i in (1, 2, 3)])


@pytest.mark.parametrize("rule_class", RULES)
@pytest.mark.parametrize("executor", ["inline", "threads"])
def test_answers_and_losses_are_those_of_the_model(rule_class: type, executor: str) -> None:
    modules, pairs = row(3), random_pairs(0, 7)
    outputs = list(run(circuit_of(modules), pairs, rule=rule_class(mse), executor=executor))
    for output, (x, y) in zip(outputs, pairs, strict=True):
        answer = nn.Sequential(*modules)(x)
        assert torch.equal(output.value, answer)
        assert output.loss == mse(answer, y).item()
        assert not output.value.requires_grad
    assert next(iter(run(circuit_of(modules), [pairs[0][0]]))).loss is None  # Forward has none


def test_frames_targets_of_any_kind_and_inference_tensors_are_taken() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    stages = stages_of([module, nn.Linear(3, 3)], torch.zeros(1, 3, 2, 2))
    frames = [Frame(torch.full((2, 2, 3), n, dtype=torch.uint8), 2 * n, n / 10) for n in range(5)]
    pairs = [(frame, {"label": n % 3}) for n, frame in enumerate(frames)]
    rule = Exact(lambda answer, target: nn.functional.cross_entropy(answer, torch.tensor([target["label"]])))
    outputs = list(run(pipelined(stages), pairs, rule=rule))
    assert [o.frame_index for o in outputs] == [0, 2, 4, 6, 8]
    model = nn.Sequential(module, stages[1].module)
    loss = torch.stack(
        [nn.functional.cross_entropy(model(f.image_BCHW), torch.tensor([n % 3])) for n, f in enumerate(frames)]
    ).mean()
    true = torch.autograd.grad(loss, module[1].weight)[0]
    torch.testing.assert_close(rule.gradients(1)["1.weight"], true)
    with torch.inference_mode():
        made = [(x.float() + 0, torch.zeros(1, 3)) for x in torch.rand(4, 1, 3, 2, 2)]
    rule = Exact(mse)
    list(run(pipelined(stages), made, rule=rule))
    assert rule.gradients(1)["1.weight"].any()


def test_forward_after_training_has_no_gradients_and_training_after_forward_has() -> None:
    modules, pairs = row(3), random_pairs(0, 8)
    circuit = circuit_of(modules)
    for executor in ("inline", "threads"):
        assert all(o.value.is_inference() for o in run(circuit, [x for x, _ in pairs], executor=executor))
        rule = Sideways(mse)
        assert not any(o.value.is_inference() for o in run(circuit, pairs, rule=rule, executor=executor))
        assert rule.gradients(1)["0.weight"].any()


def test_batch_norm_in_train_mode_learns_in_every_forward_and_in_eval_mode_is_frozen() -> None:
    for training in (True, False):
        norm = nn.BatchNorm1d(5).double().train(training)
        modules = [*row(2), nn.Sequential(norm, nn.Linear(5, 5).double())]
        list(run(circuit_of(modules), random_pairs(0, 7), rule=Sideways(mse, optimizers=adamw)))
        assert norm.num_batches_tracked == (7 if training else 0)
        assert bool(norm.running_mean.any()) == training


@pytest.mark.parametrize("executor", ["inline", "threads"])
@pytest.mark.parametrize("rule_class", RULES)
def test_a_loss_that_is_not_finite_stops_before_any_update_with_it(rule_class: type, executor: str) -> None:
    modules, pairs = row(1), random_pairs(0, 6)
    pairs[3] = (pairs[3][0], torch.full((2, 5), float("nan"), dtype=torch.float64))
    rule = rule_class(mse, optimizers=adamw, update="clip")
    if rule_class is Sideways:
        rule = Sideways(mse, optimizers=adamw)
    with pytest.raises(StageError, match=r"loss of frame 3 \(tick 3\) is nan; nothing was updated with it"):
        list(run(circuit_of(modules), pairs, rule=rule, executor=executor))
    assert rule.num_updates == ((3,) if rule_class is Sideways else (0,))
    assert all(torch.isfinite(p).all() for p in modules[0].parameters())


def test_stages_that_share_a_parameter_are_refused() -> None:
    modules = row(3)
    modules[2][0].weight = modules[0][0].weight
    with pytest.raises(CircuitError, match=r"'0.weight' of stage 1 .* is also '0.weight' of stage 3 .* untie them"):
        run(circuit_of(modules), [], rule=Sideways(mse))


def test_circuits_that_cannot_go_back_are_refused() -> None:
    stages = random_modules(0, 3)
    zeros = torch.zeros(2, 5, dtype=torch.float64)
    fed_back = with_feedback(pipelined(stages), source=3, output=0, target=2, input=0, initial=zeros)
    for circuit, message in [
        (with_periods(pipelined(stages), [1, 2, 2]), r"periods \(1, 2, 2\): stages that hold their output"),
        (fed_back, "feedback wires cannot be trained"),
    ]:
        with pytest.raises(CircuitError, match=message):
            run(circuit, [], rule=Sideways(mse))


def test_a_rule_stays_with_its_stages() -> None:
    rule, stages = Sideways(mse), stages_of(row(3), torch.zeros(2, 5, dtype=torch.float64))
    list(run(pipelined(stages), random_pairs(0, 3), rule=rule))
    list(run(parallel(stages), random_pairs(0, 3), rule=rule))  # other wires, same stages
    with pytest.raises(CircuitError, match="already trains the stages of another circuit"):
        run(circuit_of(row(3)), [], rule=rule)


@pytest.mark.parametrize(
    ("rule", "item", "message"),
    [
        (Sideways(mse), torch.zeros(2, 5), "takes pairs .input, target., but the stream brought a Tensor"),
        (Exact(mse), (1, 2, 3), "a tuple of 3"),
        (Sideways(lambda a, y: a - y), None, r"the loss gave a tensor of shape \(2, 5\); expected one number"),
        (Sideways(lambda a, y: 3.0), None, "the loss gave float"),
    ],
)
def test_what_the_stream_and_the_loss_must_bring(rule: Any, item: Any, message: str) -> None:
    items = random_pairs(0, 3) if item is None else [item]
    with pytest.raises(InputError, match=message):
        list(run(circuit_of(row(2)), items, rule=rule))


def test_options_that_do_not_exist_are_refused() -> None:
    for options, message in [
        ({"update": "epoch"}, "update = 'epoch'; expected one of tick, clip, manual, or a number"),
        ({"update": 0}, "update = 0"),
        ({"max_norm": 0.0}, "max_norm = 0.0"),
    ]:
        with pytest.raises(InputError, match=message):
            Sideways(mse, **options)
    for options, message in [
        ({"target": "next"}, "expected one of answered, newest"),
        ({"loss_delay": 2}, "expected 0"),
    ]:
        with pytest.raises(InputError, match=message):
            run(circuit_of(row(2)), [], rule=Sideways(mse, **options))
    for executor in ("sequential", "frame-parallel", "auto"):
        with pytest.raises(InputError, match=f"cannot run on executor '{executor}'"):
            run(circuit_of(row(2)), [], rule=Exact(mse), executor=executor)
    with pytest.raises(InputError, match="no stage 3; this rule trains none before its first run"):
        Exact(mse).gradients(3)


def test_stages_without_parameters_are_passed_through() -> None:
    first, last = row(2)
    frozen = nn.Sequential(nn.Linear(5, 5).double()).requires_grad_(False)
    modules = [first, nn.Tanh(), frozen, last]
    rule = Exact(mse, optimizers=adamw)
    pairs = random_pairs(0, 5)
    loss = torch.stack([mse(nn.Sequential(*modules)(x), y) for x, y in pairs]).mean()
    true = torch.autograd.grad(loss, first[0].weight)[0]
    list(run(circuit_of(modules), pairs, rule=rule))
    torch.testing.assert_close(rule.gradients(1)["0.weight"], true, rtol=1e-9, atol=1e-13)
    assert rule.gradients(2) == rule.gradients(3) == {}
    assert rule.optimizers[1] is rule.optimizers[2] is None
