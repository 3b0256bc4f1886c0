"""RTRL equals backprop through time at every frame; UORO does in the mean; both learn online."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from sidestream.engine.rules.forward_gradient import RTRL, ForwardGradient
from sidestream.engine.rules.uoro import UORO
from sidestream.errors import InputError, ModelError
from sidestream.nn.recurrent import GRU, LSTM, ConvGRU
from sidestream.nn.steppable import Steppable, step_through


class Elman(Steppable):
    """h = tanh(W x + U h + b); the answer is h."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.cell = nn.RNNCell(input_size, hidden_size)

    def init_state(self, frame_BD: Tensor) -> Tensor:
        return frame_BD.new_zeros(len(frame_BD), self.cell.hidden_size)

    def step(self, frame_BD: Tensor, state: Any) -> tuple[Tensor, Any]:
        h = self.cell(frame_BD, state)
        return h.clone(), h

    def forward(self, clip_BTD: Tensor) -> Tensor:
        return step_through(self, clip_BTD)[0]


class Leaky(Elman):
    """A state that is not the answer, and an answer that reads the weights and the old state directly."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        self.scale = nn.Parameter(torch.rand(hidden_size))

    def step(self, frame_BD: Tensor, state: Any) -> tuple[Tensor, Any]:
        h = 0.5 * state + 0.5 * self.cell(frame_BD, state)
        return self.scale * state * h, h


LAYERS = {
    "elman": lambda: Elman(2, 3),
    "leaky": lambda: Leaky(2, 3),
    "gru": lambda: GRU(2, 3),
    "gru of two layers": lambda: GRU(2, 2, num_layers=2),
    "lstm": lambda: LSTM(2, 3),
}


def problem(name: str, num_streams: int, num_frames: int, seed: int = 0) -> tuple[Steppable, nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    layer = LAYERS[name]().double()
    readout = nn.Linear(2 if name == "gru of two layers" else 3, 2).double()
    x_BTD, y_BTD = torch.randn(2, num_streams, num_frames, 2).double()
    return layer, readout, x_BTD, y_BTD


def bptt(layer: nn.Module, readout: nn.Module, x_BTD: Tensor, y_BTD: Tensor, first: int = 0) -> dict[str, Tensor]:
    """Autograd through the whole sequence of the sum over frames of the loss, from frame ``first`` on."""
    answers = readout(layer(x_BTD))
    total = sum(mse_loss(answers[:, t], y_BTD[:, t]) for t in range(first, x_BTD.shape[1]))
    named = {f"layer.{n}": p for n, p in layer.named_parameters()}
    named |= {f"readout.{n}": p for n, p in readout.named_parameters()}
    return dict(zip(named, torch.autograd.grad(total, list(named.values()))))


def assert_same(found: dict[str, Tensor], true: dict[str, Tensor], what: str) -> None:
    assert set(found) == set(true), what
    for name, gradient in true.items():  # float64; sums in another order
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-9, atol=1e-13, msg=lambda m, n=name: f"{what}, {n}: {m}"
        )


@pytest.mark.parametrize(("num_streams", "num_frames"), [(1, 1), (1, 9), (3, 6)])
@pytest.mark.parametrize("name", LAYERS)
def test_rtrl_equals_backprop_through_time_at_every_frame(name: str, num_streams: int, num_frames: int) -> None:
    layer, readout, x_BTD, y_BTD = problem(name, num_streams, num_frames)
    learner = RTRL(layer, mse_loss, readout=readout)
    for t in range(num_frames):
        loss = learner.step(x_BTD[:, t], y_BTD[:, t])
        clip = x_BTD[:, : t + 1]
        assert_same(learner.gradients(), bptt(layer, readout, clip, y_BTD[:, : t + 1]), f"{name}, frame {t}")
        torch.testing.assert_close(loss, mse_loss(readout(layer(clip)[:, -1]), y_BTD[:, t]).detach())


def test_rtrl_of_maps_and_without_a_readout() -> None:
    torch.manual_seed(0)
    layer = ConvGRU(1, 1).double()
    x, y = torch.randn(2, 2, 4, 1, 3, 2).double()
    learner = RTRL(layer, mse_loss)
    for t in range(4):
        learner.step(x[:, t], y[:, t])
    assert_same(learner.gradients(), bptt(layer, nn.Identity(), x, y), "ConvGRU")


@pytest.mark.parametrize("late", [0, 1, 4])
def test_a_frame_without_a_target_still_has_influence(late: int) -> None:
    layer, readout, x_BTD, y_BTD = problem("gru", 2, 6)
    learner = RTRL(layer, mse_loss, readout=readout)
    for t in range(6):
        loss = learner.step(x_BTD[:, t], y_BTD[:, t] if t >= late else None)
        assert (loss is None) == (t < late)
    assert_same(learner.gradients(), bptt(layer, readout, x_BTD, y_BTD, first=late), f"targets from {late} on")


def means_of_uoro(name: str, num_frames: int, num_draws: int, num_groups: int) -> tuple[list[dict[str, Tensor]], Any]:
    """The same stream ``num_draws`` times side by side, each with signs of its own; one mean per seed."""
    layer, readout, x_BTD, y_BTD = problem(name, 1, num_frames)
    x, y = x_BTD.expand(num_draws, -1, -1), y_BTD.expand(num_draws, -1, -1)
    found = []
    for seed in range(num_groups):
        learner = UORO(layer, mse_loss, readout=readout, seed=seed)
        for t in range(num_frames):
            learner.step(x[:, t], y[:, t])
        found.append(learner.gradients())
    return found, (layer, readout, x_BTD, y_BTD)


def deviations(found: list[dict[str, Tensor]], true: dict[str, Tensor]) -> Tensor:
    """Of the mean from the truth, in standard errors, per weight of the layer."""
    out = []
    for name in (n for n in true if n.startswith("layer.")):
        each = torch.stack([f[name] for f in found])
        error = (each.std(0) / math.sqrt(len(found))).clamp(min=1e-10)  # some weights leave nothing to chance
        out.append(((each.mean(0) - true[name]) / error).flatten())
    return torch.cat(out)


@pytest.mark.parametrize("name", ["elman", "leaky", "gru", "lstm"])
def test_uoro_is_unbiased(name: str) -> None:
    """20 means of 500 draws, for each of 21 to 84 weights: |t| of 19 degrees of freedom is above 6 with probability
    9e-6. The gradient without memory is found out, and so is half of what goes through it."""
    num_frames = 4
    found, (layer, readout, x_BTD, y_BTD) = means_of_uoro(name, num_frames, num_draws=500, num_groups=20)
    true = bptt(layer, readout, x_BTD, y_BTD)
    assert deviations(found, true).abs().max() < 6
    for n in (n for n in true if n.startswith("readout.")):  # no chance in these
        torch.testing.assert_close(found[0][n], true[n])
    learner = RTRL(layer, mse_loss, readout=readout)
    learner._advance = lambda *_: None  # type: ignore[method-assign]  # what is left is the gradient without memory
    for t in range(num_frames):
        learner.step(x_BTD[:, t], y_BTD[:, t])
    without = learner.gradients()
    assert deviations(found, without).abs().max() > 20
    halved = {n: (true[n] + without[n]) / 2 for n in true}
    assert deviations(found, halved).abs().max() > 10


def test_uoro_repeats_with_its_seed_and_draws_apart_for_each_stream() -> None:
    layer, readout, x_BTD, y_BTD = problem("gru", 1, 5)

    def gradients(seed: int, num_streams: int) -> dict[str, Tensor]:
        learner = UORO(layer, mse_loss, readout=readout, seed=seed)
        for t in range(5):
            learner.step(x_BTD[:, t].expand(num_streams, -1), y_BTD[:, t].expand(num_streams, -1))
        return learner.gradients()

    name = "layer.rnn.weight_hh_l0"
    assert torch.equal(gradients(0, 1)[name], gradients(0, 1)[name])
    assert not torch.allclose(gradients(0, 1)[name], gradients(1, 1)[name])
    assert not torch.allclose(gradients(0, 2)[name], gradients(0, 1)[name])


def test_streams_start_anew() -> None:
    layer, readout, x_BTD, y_BTD = problem("lstm", 2, 4)
    learner = RTRL(layer, mse_loss, readout=readout)
    for _ in range(2):
        learner.reset()
        learner.zero_gradients()
        for t in range(4):
            learner.step(x_BTD[:, t], y_BTD[:, t])
    true = bptt(layer, readout, x_BTD, y_BTD)
    assert_same(learner.gradients(), true, "second time")
    learner.assign_gradients()
    for prefix, module in (("layer", layer), ("readout", readout)):
        for n, p in module.named_parameters():
            torch.testing.assert_close(p.grad, true[f"{prefix}.{n}"])


def test_frozen_weights_get_no_gradient() -> None:
    layer, readout, x_BTD, y_BTD = problem("gru", 1, 3)
    true = bptt(layer, readout, x_BTD, y_BTD)
    layer.rnn.weight_hh_l0.requires_grad_(False)  # type: ignore[union-attr]
    for kind in (RTRL, UORO):
        learner: ForwardGradient = kind(layer, mse_loss, readout=readout)
        for t in range(3):
            learner.step(x_BTD[:, t], y_BTD[:, t])
        assert set(true) - set(learner.gradients()) == {"layer.rnn.weight_hh_l0"}
        if kind is RTRL:
            assert_same(learner.gradients(), {n: true[n] for n in learner.gradients()}, "the others")


def copy_losses(kind: type[ForwardGradient], num_frames: int, num_streams: int, rate: float, delay: int = 2) -> Tensor:
    """Online: signs, to be said again ``delay`` frames later; one update per frame, streams that never end."""
    torch.manual_seed(0)
    layer, readout = GRU(1, 8), nn.Linear(8, 1)
    learner = kind(layer, mse_loss, readout=readout)
    optimizer = torch.optim.Adam([*layer.parameters(), *readout.parameters()], lr=rate)
    signs_TB1 = torch.randint(2, (num_frames, num_streams, 1)) * 2.0 - 1
    losses = []
    for t in range(num_frames):
        losses.append(learner.step(signs_TB1[t], signs_TB1[t - delay] if t >= delay else None))
        learner.assign_gradients()
        optimizer.step()
        learner.zero_gradients()
    return torch.stack([loss for loss in losses if loss is not None])


COPIES = [(RTRL, 200, 8, 0.03), pytest.param(UORO, 500, 32, 0.01, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("kind", "num_frames", "num_streams", "rate"), COPIES)
def test_a_delayed_copy_is_learnt_online(
    kind: type[ForwardGradient], num_frames: int, num_streams: int, rate: float
) -> None:
    """1 is the loss of an answer that remembers nothing."""
    losses = copy_losses(kind, num_frames, num_streams, rate)
    assert losses[:20].mean() > 0.8
    assert losses[-30:].mean() < 0.1


def test_what_cannot_be_learnt_this_way_is_refused() -> None:
    with pytest.raises(ModelError, match="floating-point"):
        RTRL(nn_without_state(), mse_loss).step(torch.zeros(1, 2))
    learner = RTRL(GRU(2, 3), mse_loss)
    learner.step(torch.zeros(2, 2))
    with pytest.raises(InputError, match="reset"):
        learner.step(torch.zeros(3, 2))


def nn_without_state() -> Steppable:
    class Plain(Elman):
        def init_state(self, frame_BD: Tensor) -> Any:
            return None

    return Plain(2, 3)
