"""Converted stages and memory: weights that change, inputs that are one tensor, answers that are the caller's own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sidestream.circuit.stage import Link, Stage, Stages, Values
from sidestream.engine.backends import compile_stages
from sidestream.engine.backends.tensors import converted, draw_plan
from sidestream.errors import BackendError, CircuitError, LayoutError

FAST = ["onnxruntime", "openvino"]
SLOW = pytest.param("inductor", marks=pytest.mark.slow)


def make_stage(module: nn.Module, *example: Tensor) -> Stage:
    module.eval()

    def step(inputs: Values, state: object) -> tuple[Values, object]:
        with torch.no_grad():
            answer = module(*inputs)
        return tuple(answer) if isinstance(answer, tuple) else (answer,), state

    return Stage("part", step, len(example), len(step(example, None)[0]), module=module, example_inputs=example)


def on(backend: str, stage: Stage, **options: object) -> Stage:
    links = [Link(0, n, 1, n) for n in range(stage.num_inputs)] + [Link(1, n, 2, n) for n in range(stage.num_outputs)]
    in_spec = pytree.tree_structure((tuple(range(stage.num_inputs)), {}))
    out_spec = pytree.tree_structure(tuple(range(stage.num_outputs)))
    return compile_stages(Stages((stage,), tuple(links), in_spec, out_spec), backend, **options)[0]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("grid", torch.linspace(0, 1, 36).view(1, 1, 6, 6), persistent=False)
        self.constant = torch.full((3, 1, 1), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.grid + self.constant


def assign(net: Net, name: str, value: object) -> None:
    owner, _, key = name.rpartition(".")
    setattr(net.get_submodule(owner), key, value)


CHANGES: dict[str, Callable[[Net], object]] = {
    "in place": lambda net: net.conv.weight.add_(1),
    "through .data": lambda net: net.conv.weight.data.mul_(1.1),
    "other memory": lambda net: setattr(net.conv.weight, "data", net.conv.weight.data.clone()),
    "replaced": lambda net: assign(net, "conv.weight", nn.Parameter(net.conv.weight.clone())),
    "loaded": lambda net: net.load_state_dict(Net().state_dict()),
    "assigned": lambda net: net.load_state_dict(Net().state_dict(), assign=True),
    "a running mean": lambda net: net.norm.running_mean.add_(1),
    "a buffer": lambda net: assign(net, "grid", net.grid * 2),
    "a plain tensor": lambda net: assign(net, "constant", net.constant * 2),
    "an optimizer": lambda net: _one_update(net),
}


def _one_update(net: Net) -> None:
    with torch.enable_grad():
        net(noise(1, 2, 8, 8)).sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()


def pretended(stage: Stage) -> Stage:
    plan = draw_plan(stage, "pretended")
    return converted(stage, plan, "pretended", lambda tensors: [stage.module(*tensors)])


@pytest.mark.parametrize("how", CHANGES)
def test_changed_weights_are_refused_until_converted_again(how: str) -> None:
    net = Net()
    stage = make_stage(net, noise(1, 2, 8, 8))
    done = pretended(stage)
    assert done.guard is not None
    done.step((noise(1, 2, 8, 8, seed=1),), None)
    done.guard()
    with torch.no_grad():
        CHANGES[how](net)
    with pytest.raises(
        CircuitError, match=r"weights of stage 'part' were changed after .* 'pretended' .*convert again"
    ):
        done.guard()
    again = pretended(stage)
    assert again.guard is not None
    again.guard()


def test_weights_made_under_inference_mode_are_seen_when_replaced() -> None:
    with torch.inference_mode():
        net = Net()
    done = pretended(make_stage(net, noise(1, 2, 8, 8)))
    assert done.guard is not None
    done.guard()
    net.conv.weight = nn.Parameter(noise(3, 2, 3, 3))
    with pytest.raises(CircuitError, match=r"conv\.weight"):
        done.guard()


def test_weights_that_are_nan_or_in_odd_memory_are_no_change() -> None:
    net = Net()
    with torch.no_grad():
        net.conv.bias.fill_(torch.nan)
        net.conv.to(memory_format=torch.channels_last)
    net.register_buffer("wide", torch.zeros(1).expand(7))
    net.register_buffer("none", torch.zeros(0, 3))
    net.register_buffer("holes", torch.zeros(4, 4)[::2, ::2])
    net.register_buffer("truth", torch.ones(3) > 0)
    done = pretended(make_stage(net, noise(1, 2, 8, 8)))
    assert done.guard is not None
    done.guard()


def test_the_guard_that_a_stage_had_comes_first() -> None:
    called: list[str] = []
    net = Net()
    stage = replace(make_stage(net, noise(1, 2, 8, 8)), guard=lambda: called.append("cut"))
    done = pretended(stage)
    assert done.guard is not None
    done.guard()
    assert called == ["cut"]
    with torch.no_grad():
        net.conv.bias.add_(1)
    with pytest.raises(CircuitError):
        done.guard()
    assert called == ["cut", "cut"]


@pytest.mark.parametrize("backend", FAST)
def test_a_converted_stage_and_its_twin_are_guarded(backend: str) -> None:
    net = Net()
    done = on(backend, make_stage(net, noise(1, 2, 8, 8)), check="once")
    with torch.no_grad():
        net.conv.bias.add_(1)
    for stage in (done, done.twin(), done.twin().twin()):
        assert stage.guard is not None
        with pytest.raises(CircuitError, match=f"converted for '{backend}'"):
            stage.guard()


class Shares(nn.Module):
    """Hands one input through, makes views of the other, a constant, and something new."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(noise(3))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return b, a.reshape(3, 2), a - 2 * b, self.weight * 1, b[:1], a


@pytest.mark.parametrize("backend", [*FAST, SLOW])
def test_inputs_that_are_one_tensor_and_answers_that_are_kept(backend: str) -> None:
    """The example is one tensor twice; frames are two tensors, one tensor twice, and two views of one memory."""
    both = noise(2, 3)
    stage = make_stage(Shares(), both, both)
    done = on(backend, stage)
    memory = noise(3, 3, seed=7)
    frames = [
        (noise(2, 3, seed=1), noise(2, 3, seed=2)),
        (both, both),
        (memory[:2], memory[1:]),
        (noise(3, 2).T, noise(2, 6)[:, ::2]),
    ]
    expected = [tuple(value.clone() for value in stage.step(frame, None)[0]) for frame in frames]
    answers = [done.step(frame, None)[0] for frame in frames]
    for frame, answer, right in zip(frames, answers, expected, strict=True):
        assert answer[0] is frame[1]
        assert answer[5] is frame[0]
        for given, wanted in zip(answer, right, strict=True):
            torch.testing.assert_close(given, wanted, rtol=0, atol=1e-6)
    kept = [tuple(value.clone() for value in answer) for answer in answers]
    for answer in answers:  # the caller writes over what is its own, and over its frames
        for n in (1, 2, 3, 4):
            answer[n].fill_(torch.nan)
    fresh = (noise(2, 3, seed=1), noise(2, 3, seed=2))
    for given, wanted in zip(done.step(fresh, None)[0], kept[0], strict=True):
        assert torch.equal(given, wanted)
    mine = done.step(fresh, None)[0]
    for value in fresh:
        value.fill_(torch.nan)
    for n in (1, 2, 3, 4):
        assert torch.equal(mine[n], kept[0][n])


@pytest.mark.parametrize("backend", FAST)
def test_several_twins_at_once_answer_as_one(backend: str) -> None:
    body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Softmax(1))
    done = on(backend, make_stage(body, noise(1, 3, 32, 32)), check="once")
    frames = [(noise(1, 3, 32, 32, seed=seed),) for seed in range(20)]
    serial = [done.step(frame, None)[0][0].clone() for frame in frames]
    answers: dict[int, list[Tensor]] = {}
    start = threading.Barrier(4)

    def work(n: int, stage: Stage) -> None:
        start.wait()
        answers[n] = [stage.step(frame, None)[0][0] for frame in frames]

    threads = [threading.Thread(target=work, args=(n, done.twin())) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4
    for mine in answers.values():
        assert all(torch.equal(answer, right) for answer, right in zip(mine, serial, strict=True))


def test_numbers_that_openvino_would_round_are_refused() -> None:
    class Plus(nn.Module):
        def forward(self, n: Tensor) -> Tensor:
            return n + 1

    done = on("openvino", make_stage(Plus(), torch.tensor([1, 2])))
    assert done.step((torch.tensor([2**24, -(2**24)]),), None)[0][0].tolist() == [2**24 + 1, 1 - 2**24]
    with pytest.raises(LayoutError, match=str(2**40)):
        done.step((torch.tensor([1, 2**40]),), None)
    with pytest.raises(BackendError, match=str(-(2**40))):
        on("openvino", make_stage(Plus(), torch.tensor([1, -(2**40)])))


@pytest.mark.slow
def test_inductor_answers_in_every_memory_layout() -> None:
    done = on("inductor", make_stage(nn.Conv2d(3, 4, 3), noise(1, 3, 8, 8)))
    frame = noise(1, 3, 8, 8, seed=1)
    plain = done.step((frame,), None)[0][0].clone()
    for other in (frame.to(memory_format=torch.channels_last), torch.stack([frame, frame], -1)[..., 0]):
        assert torch.equal(done.step((other,), None)[0][0], plain)
