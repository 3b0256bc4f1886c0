"""Truncated back-propagation through time against a loop written by hand."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train.layered import NUM_CLASSES, gradients_of, random_clip, step_of
from train.streamed import Recurrent, recurrent
from train.tiny import CONFIG, tiny_data, tiny_net

from sidestream.errors import InputError
from sidestream.models.autoencoder import conv_autoencoder
from sidestream.nn.conv3d import CausalConv3d, Conv3d
from sidestream.train import RULES, StepContext, TrainConfig, fit
from sidestream.train.answering import Answering


def by_hand(model: Recurrent, clip_BTCHW: Tensor, labels_B: Tensor, num_frames: int) -> list[float]:
    """The whole chain's state is two hidden ones; every frame is answered."""
    grid, _, head, cell = model.chain.layers
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    hidden, memory = torch.zeros(3, 4, 8, 8).double(), torch.zeros(1, 3, NUM_CLASSES).double()
    losses, waiting = [], []
    for t in range(clip_BTCHW.shape[1]):
        hidden = grid._advance(grid.from_frame(clip_BTCHW[:, t]), hidden)
        features = head.module(torch.tanh(hidden))
        answer, memory = cell.rnn(features.unsqueeze(1), memory)
        waiting.append(F.cross_entropy(answer[:, 0], labels_B))
        if (t + 1) % num_frames == 0 or t + 1 == clip_BTCHW.shape[1]:
            loss = sum(waiting) / len(waiting)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += [float(x.detach()) for x in waiting]
            waiting, hidden, memory = [], hidden.detach(), memory.detach()
    return losses


def trained(model: nn.Module, clip_BTCHW: Tensor, labels_B: Tensor, num_frames: int) -> tuple[int, float]:
    """Number of updates, and the loss that is reported."""
    step = step_of(model, clip_BTCHW, "backprop", bptt_frames=num_frames)
    (optimizer,) = step.make_optimizers(functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9))
    calls: list[Any] = []

    def update(numbers: Any) -> None:
        calls.append(numbers)
        optimizer.step()
        optimizer.zero_grad()

    metrics = step.step(clip_BTCHW, labels_B, update)
    assert all(tuple(numbers) == (0,) for numbers in calls)
    return len(calls), float(metrics["loss"])


@pytest.mark.parametrize(("num_frames", "num_updates"), [(1, 9), (2, 5), (4, 3), (9, 1), (100, 1)])
def test_equals_a_loop_by_hand(num_frames: int, num_updates: int) -> None:
    """Weights after the updates of a clip of nine frames, parameter by parameter."""
    model, (clip_BTCHW, labels_B) = recurrent(), random_clip()
    twin, before = copy.deepcopy(model), copy.deepcopy(model)
    losses = by_hand(twin, clip_BTCHW, labels_B, num_frames)
    count, loss = trained(model, clip_BTCHW, labels_B, num_frames)
    assert count == num_updates
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    for (name, ours), theirs, old in zip(model.named_parameters(), twin.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=name)
        assert not ours.equal(old)


@pytest.mark.parametrize(("num_frames", "windows"), [(4, [4, 3]), (3, [3, 3, 1]), (1, [1] * 7)])
def test_answers_without_a_target_make_no_update(num_frames: int, windows: list[int]) -> None:
    """The last two of nine answers ask for frames behind the end; momentum and weight decay would show an update."""
    torch.manual_seed(0)
    model, (clip_BTCHW, labels_B) = conv_autoencoder((4,)).double(), random_clip()
    twin = copy.deepcopy(model)
    make = functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9, weight_decay=0.1)
    optimizer, start, total = make(twin.parameters()), 0, 0.0
    for count in windows:
        shown, wanted = clip_BTCHW[:, start : start + count], clip_BTCHW[:, start + 2 : start + count + 2]
        loss = F.mse_loss(twin(shown), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        start, total = start + count, total + float(loss.detach()) * count
    config = TrainConfig(task="future", horizon=2, bptt_frames=num_frames)
    net = Answering(model, "future")
    step = RULES["backprop"](StepContext(model, net, config, lambda loss: loss.backward(), clip_BTCHW))
    (optimizer,) = step.make_optimizers(make)
    calls: list[Any] = []

    def update(numbers: Any) -> None:
        calls.append(numbers)
        optimizer.step()
        optimizer.zero_grad()

    metrics = step.step(clip_BTCHW, labels_B, update)
    assert len(calls) == len(windows)
    assert float(metrics["loss"]) == pytest.approx(total / 7, rel=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=name)


LAYERS = [(), (CausalConv3d(4, 4, 3, stride=(2, 1, 1), padding=1),), (Conv3d(4, 4, 3, padding=1),)]


@pytest.mark.parametrize("temporal", LAYERS, ids=["every frame", "every second", "looks ahead"])
def test_one_window_is_back_propagation_through_time(temporal: tuple[nn.Module, ...]) -> None:
    """Against the clip form, also where the stream answers less often, or late."""
    model, given = recurrent(*temporal), random_clip()
    expected, theirs = gradients_of(model, *given, "backprop")
    found, ours = gradients_of(model, *given, "backprop", bptt_frames=9)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-13, msg=name)
    assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-6)
    assert ours["accuracy"] == theirs["accuracy"]
    truncated = trained(model, *given, 1)
    assert truncated[0] == {0: 9, 1: 5 if temporal and temporal[0].stride[0] == 2 else 8}[len(temporal)]


def test_trains_in_the_loop_and_is_evaluated_as_ever(tmp_path: Path) -> None:
    config = CONFIG.replace(epochs=2, task="frame", bptt_frames=3)
    torch.manual_seed(0)
    result = fit(Recurrent(), tiny_data(), tiny_data("test", 8), config=config, out=tmp_path / "run")
    assert result.num_epochs == 2
    assert result.test_accuracy is not None


REFUSED = [
    ({"task": "clip"}, "bptt_frames=2 with task='clip', whose one loss at the end.*use task='frame'"),
    ({"accumulate": 2}, "makes its updates within a batch"),
    ({"precision": "bf16"}, "it trains in float32"),
    ({"feedback": "direct"}, "crosses no state"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = CONFIG.replace(**{"task": "frame", "bptt_frames": 2, **changes})
    with pytest.raises(InputError, match=message):
        fit(Recurrent(), tiny_data(), config=config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_stream_is_refused(tmp_path: Path) -> None:
    config = CONFIG.replace(task="frame", bptt_frames=2)
    with pytest.raises(InputError, match=r"Tiny, which has no streaming form.*such as cnn_gru"):
        fit(tiny_net(), tiny_data(), config=config, out=tmp_path / "run")
