"""Forward and backward waves: Sideways where the delay is pure; closed forms and backprop where the input is still."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn

from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.wiring import pipelined
from sidestream.engine import run
from sidestream.engine.rules.diffusion import DiffusionTick, diffusion
from sidestream.engine.rules.sideways import Sideways
from sidestream.engine.rules.training import StageGradient
from sidestream.errors import InputError

mse = nn.functional.mse_loss


def row(depth: int, seed: int = 0, width: int = 4) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [nn.Sequential(nn.Linear(width, width), nn.Tanh()).double() for _ in range(depth)]


def conv_row(seed: int = 0) -> list[nn.Module]:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh()), nn.AvgPool2d(2)]
    layers += [nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()), nn.Sequential(nn.Flatten(), nn.Linear(2, 2))]
    return [layer.double() for layer in layers]


def moving(shape: tuple[int, ...], target_shape: tuple[int, ...], num_frames: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [(draw(shape), draw(target_shape)) for _ in range(num_frames)]


def backprop(layers: list[nn.Module], frame: Tensor, target: Tensor) -> list[dict[str, Tensor]]:
    loss = mse(nn.Sequential(*layers)(frame), target)
    named = [dict(layer.named_parameters()) for layer in layers]
    grads = iter(torch.autograd.grad(loss, [p for d in named for p in d.values()]))
    return [{name: next(grads) for name in d} for d in named]


@pytest.mark.parametrize("rate", [0.0, 0.05])
@pytest.mark.parametrize("net", ["row of 1", "row of 2", "row of 5", "conv"])
def test_a_pure_delay_is_the_sideways_rule_in_every_tick(net: str, rate: float) -> None:
    """On a moving stream, tick by tick and parameter by parameter, also while the weights move."""

    def build() -> list[nn.Module]:
        return conv_row() if net == "conv" else row(int(net[-1]))

    pairs = moving((2, 2, 6, 6), (2, 2), 14) if net == "conv" else moving((3, 4), (3, 4), 14)
    layers, records = build(), list[StageGradient]()
    rule = Sideways(mse, optimizers=functools.partial(torch.optim.SGD, lr=rate), observe=records.append)
    outputs = list(run(pipelined(stages_of(layers, pairs[0][0])), pairs, rule=rule, executor="inline"))
    expected = {(r.tick, r.stage): r.gradients for r in records if r.tick < len(pairs)}
    assert len(expected) == sum(len(pairs) - 2 * len(layers) + 1 + n for n in with_parameters(layers))

    ours = build()
    found, losses = {}, []
    for t, tick in enumerate(diffusion(ours, mse, pairs)):
        losses += [] if tick.loss is None else [tick.loss.item()]
        for n, gradients in enumerate(tick.gradients, start=1):
            if gradients:
                found[t, n] = gradients
                with torch.no_grad():
                    for name, p in ours[n - 1].named_parameters():
                        p -= rate * gradients[name]
    assert set(found) == set(expected)
    for key, gradients in expected.items():
        assert set(found[key]) == set(gradients)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[key][name], gradient, rtol=1e-12, atol=1e-15, msg=f"{key}, {name}")
    assert losses == pytest.approx([o.loss for o in outputs][: len(losses)], rel=1e-12)


def with_parameters(layers: list[nn.Module]) -> list[int]:
    return [n for n, layer in enumerate(layers, start=1) if list(layer.parameters())]


def error_per_tick(layers: list[nn.Module], pair: tuple[Tensor, Tensor], num_ticks: int, tau: float) -> Tensor:
    """(ticks, layers): |pseudo-gradient - backprop's| / |backprop's| on a still input; infinite before there is one."""
    true = backprop(layers, *pair)
    rows = []
    for tick in diffusion(layers, mse, [pair] * num_ticks, time_constant=tau, target_delay=0):
        row_ = []
        for gradients, right in zip(tick.gradients, true, strict=True):
            if gradients is None:
                row_.append(math.inf)
                continue
            off = sum(((gradients[n] - right[n]) ** 2).sum() for n in right)
            row_.append(float(off.sqrt() / sum((right[n] ** 2).sum() for n in right).sqrt()))
        rows.append(row_)
    return torch.tensor(rows)


@pytest.mark.parametrize("depth", [1, 2, 4, 7])
def test_on_a_still_input_a_pure_delay_is_exact_from_tick_2_K_minus_1_on(depth: int) -> None:
    errors = error_per_tick(row(depth), moving((3, 4), (3, 4), 1)[0], 2 * depth + 4, tau=1)
    ticks = torch.arange(len(errors))
    for n in range(1, depth + 1):
        ready_at = (depth - 1) + (depth - n)
        assert (errors[ticks < ready_at, n - 1] == math.inf).all()
        assert (errors[ticks >= ready_at, n - 1] < 1e-12).all()


@pytest.mark.parametrize("tau", [1.5, 3.0])
def test_on_a_still_input_a_lag_comes_to_backprops_gradient(tau: float) -> None:
    errors = error_per_tick(row(4), moving((3, 4), (3, 4), 1)[0], int(60 * tau), tau)
    assert (errors[-1] < 1e-9).all()
    assert errors[int(4 * tau)].max() > 1e-2  # not at once


def at_least(successes: int, trials: int, p: float) -> float:
    """Probability of ``successes`` or more among ``trials``."""
    if trials < 0:
        return float(successes <= 0)
    return 1 - sum(math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(min(successes, trials + 1)))


@pytest.mark.parametrize("tau", [1.0, 2.0, 5.0])
def test_the_waves_of_a_linear_chain_are_the_binomial_closed_form(tau: float) -> None:
    """From rest, after n ticks: a_l / a_l* = P(l or more successes in n tosses of 1 / tau); so is the error, from the
    top down and from the tick in which the answer begins (loss: the sum, whose derivative is 1)."""
    depth, weights = 4, [0.9, -1.3, 0.7, 1.1]
    layers = [nn.Linear(1, 1, bias=False).double() for _ in weights]
    for layer, w in zip(layers, weights, strict=True):
        nn.init.constant_(layer.weight, w)  # type: ignore[arg-type]
    pairs = [(torch.ones(1, 1).double(), torch.zeros(1))] * 40
    ticks = diffusion(layers, lambda a, _: a.sum(), pairs, time_constant=tau, target_delay=0)
    for t, tick in enumerate(ticks):
        for n in range(1, depth + 1):
            still = math.prod(weights[:n])
            a, d = tick.waves.activations[n - 1], tick.waves.errors[n - 1]
            assert (0.0 if a is None else a.item()) == pytest.approx(still * at_least(n, t + 1, 1 / tau), abs=1e-12)
            share = at_least(depth - n, t - (depth - 1), 1 / tau) if t >= depth - 1 else 0.0
            assert (0.0 if d is None else d.item()) == pytest.approx(math.prod(weights[n:]) * share, abs=1e-12)
            if tick.gradients[n - 1] is not None:
                below = 1.0 if n == 1 else math.prod(weights[: n - 1]) * at_least(n - 1, t, 1 / tau)
                found = tick.gradients[n - 1]["weight"].item()  # type: ignore[index]
                assert found == pytest.approx(math.prod(weights[n:]) * share * below, abs=1e-12)


@pytest.mark.parametrize("tau", [2.0, 4.0, 8.0])
def test_a_larger_time_constant_converges_at_the_geometric_rate_predicted(tau: float) -> None:
    """Linearised at the end, every unit forgets a share 1 / tau per tick, and m = 2 K - 1 of them in a row stand before
    the first layer's gradient: its error falls as C(t, m - 1) (1 - 1 / tau)^t to leading order in t."""
    depth = 2
    m, start, end = 2 * depth - 1, int(12 * tau), int(20 * tau)
    errors = error_per_tick(row(depth), moving((3, 4), (3, 4), 1)[0], end + 1, tau)[:, 0]
    measured = math.log(errors[end] / errors[start])
    geometric = (end - start) * math.log(1 - 1 / tau)
    predicted = geometric + math.log(math.comb(end, m - 1) / math.comb(start, m - 1))
    assert measured == pytest.approx(predicted, rel=0.01)


def frames_to_reach(errors: Tensor, threshold: float) -> int:
    return int((errors.max(1).values > threshold).nonzero().max()) + 1


def test_convergence_takes_ticks_in_proportion_to_the_time_constant() -> None:
    pair = moving((3, 4), (3, 4), 1)[0]
    ticks = {tau: frames_to_reach(error_per_tick(row(3), pair, int(60 * tau), tau), 1e-6) for tau in (2.0, 4.0, 8.0)}
    assert ticks[2.0] < ticks[4.0] < ticks[8.0]
    assert ticks[8.0] / ticks[4.0] == pytest.approx(2, rel=0.2)


def test_targets_wait_for_the_forward_wave() -> None:
    seen: list[float] = []

    def loss(answer: Tensor, target: Tensor) -> Tensor:
        seen.append(target.item())
        return (answer * target).sum()

    pairs = [(torch.ones(1, 4).double(), torch.tensor(float(t))) for t in range(12)]
    ticks: list[DiffusionTick] = list(diffusion(row(3), loss, pairs, time_constant=2.0))
    assert seen == [float(t) for t in range(12 - 5)]
    assert [t for t, tick in enumerate(ticks) if tick.answer is None] == [0, 1]
    assert [t for t, tick in enumerate(ticks) if tick.loss is None] == [0, 1, 2, 3, 4]


def test_a_time_constant_below_a_tick_is_refused() -> None:
    with pytest.raises(InputError, match=r"time_constant = 0\.5"):
        next(diffusion(row(2), mse, moving((3, 4), (3, 4), 1), time_constant=0.5))
