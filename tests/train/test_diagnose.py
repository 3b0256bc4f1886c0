"""Errors of approximate gradients: closed forms, a slow twin, autograd; the bound in float64; training undisturbed."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from train.layered import Layered, layered, random_clip, step_of
from train.tiny import CONFIG, tiny_fit

from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.cut import cut
from sidestream.circuit.wire import Circuit
from sidestream.circuit.wiring import parallel, pipelined, sequential
from sidestream.data import ClipOptions, synthetic_dataset
from sidestream.engine.rules.exact import Exact
from sidestream.engine.rules.sideways import Sideways
from sidestream.errors import CircuitError, InputError
from sidestream.models.vgg8 import vgg8
from sidestream.nn.combine import Chain, PerFrame
from sidestream.nn.conv3d import CausalConv3d
from sidestream.nn.feedback_alignment import own_feedback, with_random_feedback
from sidestream.report import read_json_lines
from sidestream.train import fit
from sidestream.train.diagnose import gradient_errors
from sidestream.train.gradient_bound import error_bounds, row_of
from sidestream.train.gradient_error import GradientError
from sidestream.types import InputSpec

mse = nn.functional.mse_loss
EPS = 1e-9
"""Room for rounding in float64, relative to the length of the true gradient."""


def half_square(answer: Tensor, target: Tensor) -> Tensor:
    return 0.5 * ((answer - target) ** 2).sum()


def sgd(rate: float) -> Any:
    return functools.partial(torch.optim.SGD, lr=rate)


def row(depth: int, *, seed: int = 0, width: int = 5, smooth: bool = True) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [nn.Sequential(nn.Linear(width, width), nn.Tanh() if smooth else nn.ReLU()).double() for _ in range(depth)]


def circuit_of(modules: list[nn.Module], frame: Tensor, wiring: Any = pipelined) -> Circuit:
    return wiring(stages_of(modules, frame))


def moving(num_frames: int, *, seed: int = 1, speed: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    chance = torch.Generator().manual_seed(seed)
    steps = torch.randn(num_frames, 2, 5, generator=chance, dtype=torch.float64)
    frames = torch.cat([steps[:1], speed * steps[1:]]).cumsum(0)
    return list(frames), list(torch.randn(num_frames, 2, 5, generator=chance, dtype=torch.float64))


def stage_gradients(modules: list[nn.Module], frame: Tensor, target: Tensor) -> list[Tensor]:
    """By autograd on the net in a row: one vector per stage."""
    for m in modules:
        m.zero_grad(set_to_none=True)
    half_square(nn.Sequential(*modules)(frame), target).backward()
    found = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in modules]
    for m in modules:
        m.zero_grad(set_to_none=True)
    return found


def check(each: GradientError, pseudo: Tensor, true: Tensor) -> None:
    assert each.norm == pytest.approx(float(pseudo.norm()), rel=1e-9)
    assert each.true_norm == pytest.approx(float(true.norm()), rel=1e-9)
    assert each.error == pytest.approx(float((pseudo - true).norm()), rel=1e-7, abs=1e-12)
    if not pseudo.any() or not true.any():
        assert math.isnan(each.cosine)
        return
    assert each.cosine == pytest.approx(float(torch.cosine_similarity(pseudo, true, dim=0)), abs=1e-9)
    assert each.norm_ratio == pytest.approx(float(pseudo.norm() / true.norm()), rel=1e-9)
    assert each.relative_error == pytest.approx(float((pseudo - true).norm() / true.norm()), rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_a_still_video_has_no_error(depth: int) -> None:
    """From the first gradient on, which stage i has at tick 2 K - 1 - i: the last one, stage 1, at tick 2 (K - 1)."""
    frames, targets = ([x[0]] * (3 * depth) for x in moving(1))
    found = gradient_errors(circuit_of(row(depth), frames[0]), frames, targets, mse, bounds=True)
    assert {e.stage for e in found if e.tick == 2 * (depth - 1)} == set(range(1, depth + 1))
    for e in found:
        assert e.cosine == pytest.approx(1, abs=1e-12)
        assert e.relative_error < 1e-12
        assert e.norm_ratio == pytest.approx(1, abs=1e-12)
        assert (e.motion, e.bound, e.motion_bound, e.weight_change) == (0, 0, 0, 0)
    assert min(e.tick for e in found if e.stage == 1) == 2 * (depth - 1)


@pytest.mark.parametrize("loss_delay", [0, 1])
@pytest.mark.parametrize("depth", [2, 4])
def test_gaps_frames_and_motion(depth: int, loss_delay: int) -> None:
    frames, targets = moving(2 * depth + 5)
    rule = functools.partial(Sideways, loss_delay=loss_delay)
    found = gradient_errors(circuit_of(row(depth), frames[0]), frames, targets, half_square, rule=rule, bounds=True)
    for e in found:
        assert e.age_gap == 2 * (depth - e.stage) + loss_delay
        assert e.tick == e.input_frame + e.stage - 1
        difference = (frames[e.input_frame] - frames[e.cotangent_frame]).abs().mean()
        assert e.motion == pytest.approx(float(difference), rel=1e-12)
    expected = {(i, s) for i in range(1, depth + 1) for s in range(len(frames) - 2 * (depth - i) - loss_delay)}
    assert {(e.stage, e.cotangent_frame) for e in found} == expected


@pytest.mark.parametrize("depth", [2, 3, 6])
def test_linear_nets_in_closed_form(depth: int) -> None:
    """Jacobians are constant, so the cotangents are the true ones and only the input is too new: stage i's gradient is
    c_i(s) h_(i-1)(s')^T, the true one c_i(s) h_(i-1)(s)^T. For one stream the cosine is that of the two inputs."""
    torch.manual_seed(0)
    modules: list[nn.Module] = [nn.Linear(5, 5, bias=False).double() for _ in range(depth)]
    frames, targets = moving(2 * depth + 4)
    frames, targets = ([x[:1] for x in each] for each in (frames, targets))
    found = gradient_errors(circuit_of(modules, frames[0]), frames, targets, half_square, bounds=True)
    weights = [m.weight.detach() for m in modules]
    assert len(found) > depth
    for e in found:
        cotangent = frames[e.cotangent_frame][0]
        for w in weights:
            cotangent = w @ cotangent
        cotangent = cotangent - targets[e.cotangent_frame][0]
        for w in reversed(weights[e.stage :]):
            cotangent = w.T @ cotangent
        new, old = frames[e.input_frame][0], frames[e.cotangent_frame][0]
        for w in weights[: e.stage - 1]:
            new, old = w @ new, w @ old
        check(e, torch.outer(cotangent, new).flatten(), torch.outer(cotangent, old).flatten())
        assert e.cosine == pytest.approx(float(torch.cosine_similarity(new, old, dim=0)), abs=1e-9)
        assert e.bound == pytest.approx(float(cotangent.norm() * (new - old).norm()), rel=1e-9), "tight: only P differs"


@pytest.mark.parametrize("wiring", [pipelined, sequential])
@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_exact_on_a_moving_video_has_no_error(rate: float, wiring: Any) -> None:
    """Also with weights that change, where the weights of the forward pass are stashed, at the rate 0; with a rate
    above, the weights have moved between forward and backward, and it has one."""
    frames, targets = moving(11)
    rule = functools.partial(Exact, keep="inputs and weights")
    for optimizers in (None, sgd(rate)):
        found = gradient_errors(
            circuit_of(row(4), frames[0], wiring), frames, targets, half_square, rule=rule, optimizers=optimizers
        )
        assert len(found) == 4 * 11
        assert {e.age_gap for e in found} == {0}
        assert {e.motion for e in found} == {0.0}
        worst = max(e.relative_error for e in found)
        if optimizers is None or rate == 0.0:
            assert worst < 1e-12
            assert min(e.cosine for e in found) > 1 - 1e-12
        else:
            assert worst > 1e-4


def sideways_twin(
    modules: list[nn.Module], frames: list[Tensor], targets: list[Tensor], rate: float
) -> dict[tuple[int, int], tuple[Tensor, Tensor, float]]:
    """(pseudo, true, weight change) by (stage, tick): every tick in a loop, autograd on each stage, and the whole net
    copied at each tick for the true gradient."""
    K, found = len(modules), {}
    inputs: list[Tensor | None] = [None] * K
    cotangents: list[Tensor | None] = [None] * K
    history: list[list[Tensor]] = []
    for tick in range(len(frames) + K - 1):
        inputs[0] = frames[tick] if tick < len(frames) else None
        history.append([torch.cat([p.detach().flatten() for p in m.parameters()]) for m in modules])
        outs: list[Tensor | None] = [None] * K
        sent: list[Tensor | None] = [None] * K
        steps = []
        for i, m in enumerate(modules):
            if inputs[i] is None:
                continue
            x = inputs[i].clone().requires_grad_()
            out = m(x)
            outs[i] = out.detach()
            s = tick - (2 * K - 2 - i)  # the frame of the cotangent
            if i == K - 1:
                cotangents[i] = outs[i] - targets[s]
            if cotangents[i] is None:
                continue
            gx, *gw = torch.autograd.grad(out, [x, *m.parameters()], cotangents[i])
            steps.append((m, gw))
            pseudo = torch.cat([g.flatten() for g in gw])
            true = stage_gradients(modules, frames[s], targets[s])[i]
            change = float((history[tick][i] - history[s + i][i]).norm())
            found[i + 1, tick] = pseudo, true, change
            if i:
                sent[i - 1] = gx
        with torch.no_grad():
            for m, gw in steps:
                for p, g in zip(m.parameters(), gw, strict=True):
                    p -= rate * g
        cotangents = sent
        inputs[1:] = outs[:-1]
    return found


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("depth", [1, 3, 5])
def test_equals_a_slow_twin_while_the_weights_change(depth: int, rate: float, smooth: bool) -> None:
    frames, targets = moving(13, speed=0.3)
    modules = row(depth, smooth=smooth, width=5)
    before = [p.detach().clone() for m in modules for p in m.parameters()]
    found = gradient_errors(circuit_of(modules, frames[0]), frames, targets, half_square, optimizers=sgd(rate))
    assert all(p.equal(b) for p, b in zip((p for m in modules for p in m.parameters()), before, strict=True))
    expected = sideways_twin(modules, frames, targets, rate)
    assert {(e.stage, e.tick) for e in found} == set(expected)
    for e in found:
        pseudo, true, change = expected[e.stage, e.tick]
        check(e, pseudo, true)
        assert e.weight_change == pytest.approx(change, rel=1e-9, abs=1e-15)
    if rate == 0:
        frozen = gradient_errors(circuit_of(modules, frames[0]), frames, targets, half_square)
        assert [(e.stage, e.tick) for e in frozen] == [(e.stage, e.tick) for e in found]
        for a, b in zip(frozen, found, strict=True):
            assert (a.error, a.cosine) == (pytest.approx(b.error, abs=1e-12), pytest.approx(b.cosine, abs=1e-12))
    elif depth > 1:
        assert max(e.weight_change for e in found) > 0


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    depth=st.integers(2, 7),
    smooth=st.booleans(),
    num_iterations=st.integers(0, 4),
    loss_delay=st.integers(0, 1),
    speed=st.sampled_from([1e-3, 0.1, 2.0]),
)
def test_error_bound_and_motion_bound_are_in_this_order(
    seed: int, depth: int, smooth: bool, num_iterations: int, loss_delay: int, speed: float
) -> None:
    """On random nets, smooth or with ReLUs, however few steps the power iteration makes."""
    frames, targets = moving(2 * depth + 3, seed=seed, speed=speed)
    circuit = circuit_of(row(depth, seed=seed, smooth=smooth), frames[0])
    rule = functools.partial(Sideways, loss_delay=loss_delay)
    found = gradient_errors(
        circuit, frames, targets, half_square, rule=rule, bounds=True, num_iterations=num_iterations
    )
    for e in found:
        room = EPS * max(e.true_norm, e.norm)
        assert e.bound is not None
        assert e.motion_bound is not None
        assert e.error <= e.bound + room
        assert e.bound <= e.motion_bound * (1 + EPS) + room


def test_the_bound_equals_its_formula_with_jacobians_written_out() -> None:
    """Dense Jacobians by autograd, spectral norms by SVD: the power iteration must come up to them."""
    depth, frames, targets = 3, *moving(9, speed=0.3)
    modules = row(depth)
    gaps = [2 * (depth - i) for i in range(1, depth + 1)]
    found, constants = error_bounds(
        circuit_of(modules, frames[0]), frames, targets, half_square, gaps, num_iterations=60
    )
    values = [frames]
    for m in modules:
        values.append([m(v).detach() for v in values[-1]])
    jacobian = torch.autograd.functional.jacobian

    def dense(i: int, s: int) -> tuple[Tensor, Tensor]:
        m, x = modules[i - 1], values[i - 1][s]
        parameters = dict(m.named_parameters())
        J = jacobian(m, x).reshape(10, 10)
        P = jacobian(lambda *p: torch.func.functional_call(m, dict(zip(parameters, p)), x), tuple(parameters.values()))
        return J, torch.cat([p.reshape(10, -1) for p in P], 1)

    gains = []
    for s in range(9):
        bound, true = 0.0, (values[-1][s] - targets[s]).flatten()
        for i in (3, 2, 1):
            if s + gaps[i - 1] >= 9:
                break
            (J, P), (J0, P0) = dense(i, s + gaps[i - 1]), dense(i, s)
            expected = torch.linalg.matrix_norm(P, 2) * bound + ((P - P0).T @ true).norm()
            assert float(expected) * 0.98 <= found[i, s].bound <= float(expected) * (1 + 1e-9) + 1e-12
            bound = float(torch.linalg.matrix_norm(J, 2) * bound + ((J - J0).T @ true).norm())
            gains.append((i, float(torch.linalg.matrix_norm(J, 2))))
            true = J0.T @ true
    for i in (2, 3):
        largest = max(g for n, g in gains if n == i)
        assert 0.99 * largest <= constants[i - 1].gain <= largest * (1 + 1e-9)


def test_a_relu_net_far_from_its_kinks_and_at_one() -> None:
    """While no unit switches, a ReLU net is linear; at a kink an arbitrarily small change gives a large error, so its
    Jacobian's measured slope grows without limit as the change gets smaller."""
    modules: list[nn.Module] = [nn.ReLU(), nn.Linear(5, 5, bias=False).double()]
    torch.manual_seed(0)
    modules[0] = nn.Sequential(nn.Linear(5, 5, bias=False), nn.ReLU()).double()
    target = torch.ones(1, 5, dtype=torch.float64)
    slopes = []
    for change in (1e-2, 1e-4, 1e-6):
        frame = torch.full((1, 5), 0.5, dtype=torch.float64)
        first = modules[0][0]
        with torch.no_grad():  # its first unit is off by half the change, and on at the last frame
            first.weight[0] = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0])
        ahead = frame.clone()
        frame[0, 0] -= change / 2
        ahead[0, 0] += change / 2
        frames = [frame, frame, ahead]
        _, constants = error_bounds(circuit_of(modules, frame), frames, [target] * 3, half_square, [2, 0])
        found = gradient_errors(circuit_of(modules, frame), frames, [target] * 3, half_square, bounds=True)
        (e,) = (e for e in found if e.stage == 1)
        assert e.relative_error > 0.01
        assert e.error <= (e.bound or 0.0) * (1 + EPS)
        slopes.append(constants[0].parameter_slope)
    assert slopes[1] > 50 * slopes[0]
    assert slopes[2] > 50 * slopes[1]


def test_bounds_of_a_net_with_convolutions_and_pooling() -> None:
    torch.manual_seed(0)
    net = vgg8(4, width=0.0625).double()
    frames = list(0.1 * torch.randn(17, 1, 3, 32, 32, dtype=torch.float64).cumsum(0))
    circuit = circuit_of(net.depth_modules(), frames[0])
    assert row_of(circuit) is not None
    loss = nn.functional.cross_entropy
    found = gradient_errors(circuit, frames, [torch.tensor([1])] * 17, loss, bounds=True, num_iterations=1)
    assert {e.stage for e in found} == set(range(1, 9))
    for e in found:
        assert e.error <= e.bound + EPS * e.true_norm  # type: ignore[operator]
    assert max(e.relative_error for e in found if e.stage == 1) > 0.01


def test_skips_and_cut_models_have_errors_but_no_bound() -> None:
    frames, targets = moving(16)
    circuit = parallel(stages_of(row(5), frames[0], skips="add"))
    still = gradient_errors(circuit, frames[:1] * 16, targets[:1] * 16, mse)
    assert max(e.relative_error for e in still) < 1e-12
    found = gradient_errors(circuit, frames, targets, mse)
    assert {e.stage for e in found} == {1, 2, 3, 4, 5}
    assert max(e.relative_error for e in found) > 0.01
    with pytest.raises(InputError, match="a row of stages without state"):
        gradient_errors(circuit, frames, targets, mse, bounds=True)
    changing = gradient_errors(circuit, frames, targets, mse, optimizers=sgd(0.1))
    assert max(e.weight_change for e in changing if e.stage == 1) > 0
    with pytest.raises(InputError, match="16 frames but 3 targets"):
        gradient_errors(circuit, frames, targets[:3], mse)
    model = layered(num_layers=5)
    clip, labels = random_clip(2, 11)
    stages = pipelined(cut(model.net.train(), clip[:, 0], num_stages=3, costs="uniform"))
    cuts = gradient_errors(stages, list(clip.unbind(1)), [labels] * 11, nn.functional.cross_entropy)
    assert max(e.relative_error for e in cuts if e.stage == 3) < 1e-12
    assert min(e.relative_error for e in cuts if e.stage == 1) > 1e-3


def test_stages_with_a_state_are_compared_with_exact_over_as_many_ticks() -> None:
    chain = Chain(PerFrame(nn.Conv2d(3, 4, 3, padding=1)), CausalConv3d(4, 4, 3, padding=1), PerFrame(nn.Tanh()))
    torch.manual_seed(0)
    frames = list(torch.randn(12, 1, 3, 4, 4, dtype=torch.float64))
    circuit = pipelined(cut(chain.double(), frames[0], num_stages=3, costs="uniform"))
    targets = list(torch.randn(12, 1, 4, 4, 4, dtype=torch.float64))
    exact = gradient_errors(circuit, frames, targets, mse, rule=functools.partial(Exact, state_ticks=2), state_ticks=2)
    assert len(exact) == 2 * 12
    assert max(e.relative_error for e in exact) < 1e-12
    crossing = gradient_errors(circuit, frames, targets, mse, rule=Exact, state_ticks=2)
    assert max(e.relative_error for e in crossing) > 1e-3
    with pytest.raises(CircuitError, match="diagnose it with frozen weights"):
        gradient_errors(circuit, frames, targets, mse, optimizers=sgd(0.1))
    with pytest.raises(InputError, match="a row of stages without state"):
        gradient_errors(circuit, frames, targets, mse, bounds=True)


def test_feedback_weights_against_the_true_gradients() -> None:
    """On a still video Sideways then makes no error of its own: what is left is that of the feedback weights."""
    modules, (frames, targets) = row(3), moving(7)
    stack = nn.Sequential(*modules)
    true = stage_gradients(modules, frames[0], targets[0])
    with_random_feedback(stack, seed=1)
    fed = stage_gradients(modules, frames[0], targets[0])
    found = gradient_errors(
        circuit_of(modules, frames[0]),
        frames[:1] * 7,
        targets[:1] * 7,
        half_square,
        truth=functools.partial(own_feedback, stack),
    )
    for e in found:
        check(e, fed[e.stage - 1], true[e.stage - 1])
    assert min(e.cosine for e in found if e.stage == 1) < 0.99


SPEC = InputSpec(size_px=(12, 12), mean=(0.5,) * 3, std=(0.25,) * 3, layout="BTCHW", num_frames=9)


class Dropping(Layered):
    """With batch norm and dropout: buffers and random numbers to leave alone."""

    def __init__(self) -> None:
        super().__init__(batch_norm=True)
        self.net[1].append(nn.Dropout(0.3))


def diagnosed_fit(out: Path, *, resume: bool = False, model: nn.Module | None = None, **changes: Any) -> list[dict]:
    torch.manual_seed(0)
    model = Dropping() if model is None else model
    config = CONFIG.replace(**{"epochs": 2, "lr": 0.05, **changes})
    data = synthetic_dataset(part="train", spec=SPEC, num_clips=24, options=ClipOptions())
    fit(model, data, config=config, out=out, resume=resume)
    path = out / "diagnostics.jsonl"
    return read_json_lines(path) if path.is_file() else []


def slow(options: dict[str, Any]) -> Any:
    return pytest.param(options, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "options",
    [
        slow({"rule": "sideways"}),
        {"rule": "sideways", "update": "tick", "optimizer": "adamw"},
        slow({"rule": "sideways", "update": 5, "skips": "projection", "momentum": 0.5}),
        slow({"rule": "sideways", "accumulate": 2, "target": "newest"}),
        slow({"rule": "sideways", "feedback": "random", "update": "tick"}),
        slow({"rule": "sideways", "feedback": "direct"}),
    ],
    ids=lambda o: " ".join(map(str, o.values())),
)
def test_diagnosing_changes_nothing_and_is_cut_on_resume(options: dict[str, Any], tmp_path: Path) -> None:
    """To the bit: weights, buffers, optimisers and gathered sums; the records too, when broken off and resumed."""
    assert diagnosed_fit(tmp_path / "plain", **options) == []
    records = diagnosed_fit(tmp_path / "told", diagnose=2, **options)
    ours, theirs = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("told", "plain"))
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)
    assert [(r["epoch"], r["batch"], r["stage"]) for r in records] == [
        (e, b, s) for e, b in [(0, 0), (0, 2), (1, 1)] for s in (1, 2, 3, 4)
    ]
    assert (tmp_path / "told" / "diagnostics.png").read_bytes().startswith(b"\x89PNG")
    for r in records:
        assert r["age_gap"] == 2 * (4 - r["stage"]) or options.keys() & {"skips", "feedback"}
        assert ("moving_cosine" in r) == (options.get("update", "clip") != "clip")
        assert -1 <= r["cosine"] <= 1
        if r["bound"] is not None:
            assert r["error"] <= r["bound"] * (1 + 1e-4) + 1e-6 <= r["motion_bound"] * (1 + 1e-3) + 1e-5
    assert any(r["error"] > 0.01 for r in records)
    assert {r["lr"] for r in records} != {records[0]["lr"]}
    late: list[int] = []

    def stop(*_: Any) -> None:
        """In the last batch that is diagnosed, when that is done and the clip is on its way."""
        told = tmp_path / "broken" / "diagnostics.jsonl"
        late.extend([1] * (told.is_file() and len(read_json_lines(told)) == len(records)))
        if len(late) == 5:
            raise KeyboardInterrupt

    torch.manual_seed(0)
    broken = Dropping()
    broken.net[3].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        diagnosed_fit(tmp_path / "broken", model=broken, diagnose=2, **options)
    again = diagnosed_fit(tmp_path / "broken", resume=True, model=Dropping(), diagnose=2, **options)
    assert again == records


def test_records_of_a_step_are_those_of_the_function_on_its_first_clips() -> None:
    model = layered()
    clip, labels = random_clip(3, 9)
    step: Any = step_of(model, clip, "sideways", update="tick")
    optimizers = step.make_optimizers(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
    step.step(clip, labels, lambda _: None)
    states = [o.state_dict() for o in optimizers]
    momenta = [[s["momentum_buffer"].clone() for s in state["state"].values()] for state in states]
    weights = [p.detach().clone() for p in model.parameters()]
    records = step.diagnose(clip, labels)
    assert all(p.equal(w) for p, w in zip(model.parameters(), weights, strict=True))
    for optimizer, old in zip(optimizers, momenta, strict=True):
        assert all(a["momentum_buffer"].equal(b) for a, b in zip(optimizer.state_dict()["state"].values(), old))
    frames = list(clip[:2].unbind(1))
    loss = nn.functional.cross_entropy
    found = gradient_errors(step.circuit, frames, [labels[:2]] * 9, loss, bounds=True)
    for r in records:
        own = [e for e in found if e.stage == r["stage"]]
        true = sum(e.true_norm for e in own)
        assert r["cosine"] == pytest.approx(sum(e.cosine for e in own) / len(own))
        assert r["error"] == pytest.approx(sum(e.error for e in own) / true)
        assert r["bound"] == pytest.approx(sum(e.bound or 0.0 for e in own) / true)
        assert r["moving_cosine"] < 1
        assert r["weight_change"] > 0 or r["stage"] == 4


def test_backprop_has_nothing_to_diagnose(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only 'exact' and 'sideways' are looked at"):
        tiny_fit(tmp_path / "run", diagnose=1)
    assert not math.isnan(CONFIG.lr)
