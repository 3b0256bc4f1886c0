"""Models whose stream carries a state, as stages: exact over the whole clip is back-propagation through time."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train.layered import NUM_CLASSES, gradients_of, random_clip, step_of
from train.streamed import Recurrent, recurrent
from train.tiny import CONFIG, tiny_data

from sidestream.errors import CircuitError, InputError
from sidestream.models.recurrent import ImageRecurrent
from sidestream.models.vgg8 import ShiftedNet, simple_cnn
from sidestream.nn.combine import Chain, PerFrame
from sidestream.nn.conv3d import CausalConv3d, Conv3d
from sidestream.nn.pool import MaxPool3d
from sidestream.train import fit
from sidestream.train.stages import circuit_of


class Causal3d(Recurrent):
    """Causal 3D convolutions, ReLUs that work in place, a pooling with a stride over time."""

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, NUM_CLASSES))
        self.chain = Chain(
            Chain(CausalConv3d(3, 4, 3, padding=1), PerFrame(nn.ReLU(inplace=True))),
            MaxPool3d(2, stride=(stride, 2, 2), is_causal=True),
            CausalConv3d(4, 5, 3, padding=1),
            PerFrame(nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(inplace=True))),
            PerFrame(head),
        )


def cnn_gru() -> nn.Module:
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return ImageRecurrent(NUM_CLASSES, backbone=backbone, cell="gru", hidden_size=5)


MODELS: dict[str, tuple[Any, int]] = {
    "cnn_gru": (cnn_gru, 8),
    "recurrent": (Recurrent, 8),
    "tsm_online": (lambda: ShiftedNet(simple_cnn(NUM_CLASSES, width=0.15)), 32),
    "causal 3d": (Causal3d, 8),
}


def made(name: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    make, size_px = MODELS[name]
    return make().double().eval(), random_clip(2, 10, size_px)  # eval: norms of a clip and of frames agree


@pytest.mark.parametrize("executor", ["inline", "threads"])
@pytest.mark.parametrize("name", MODELS)
def test_exact_over_the_whole_clip_is_backprop_through_time(name: str, executor: str) -> None:
    model, given = made(name)
    expected, theirs = gradients_of(model, *given, "backprop")
    found, ours = gradients_of(model, *given, "exact", state_ticks=1000, executor=executor)
    assert found.keys() == expected.keys() == {name for name, _ in model.named_parameters()}
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0, key
        torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-12, msg=key)
    assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-6)
    assert ours["accuracy"] == theirs["accuracy"]
    cut_off = gradients_of(model, *given, "exact", state_ticks=0)[0]
    assert any(not torch.allclose(cut_off[key], expected[key], atol=1e-9) for key in expected)


@pytest.mark.parametrize("name", MODELS)
def test_sideways_trains_a_batch(name: str) -> None:
    """Every parameter has a gradient; the last stage's is exact over the whole clip, for it waits for nobody."""
    model, given = made(name)
    expected = gradients_of(model, *given, "backprop")[0]
    found, _ = gradients_of(model, *given, "sideways", state_ticks=1000)
    assert found.keys() == expected.keys()
    last = circuit_of(model, given[0][:, 0])[0].stages[-1].module
    names = [key for key, p in model.named_parameters() if any(p is q for q in last.parameters())]
    assert 0 < len(names) < len(expected)
    for key in names:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-9, atol=1e-12, msg=key)
    assert all(g.isfinite().all() for g in found.values())


def test_no_stage_begins_with_a_layer_that_changes_its_input() -> None:
    model, (clip_BTCHW, _) = made("causal 3d")
    circuit, takes_any_batch = circuit_of(model, clip_BTCHW[:, 0])
    assert [stage.name for stage in circuit.stages] == ["0.0-0.1", "1", "2", "3-4"]
    assert not takes_any_batch
    assert model.chain.training is False
    with pytest.raises(InputError, match="num_stages is 6, but the stream of Causal3d has 5 parts"):
        circuit_of(model, clip_BTCHW[:, 0], 6)


def test_a_short_batch_is_filled_up() -> None:
    model, (clip_BTCHW, labels_B) = made("cnn_gru")
    expected = gradients_of(model, clip_BTCHW[:1], labels_B[:1], "backprop")[0]
    step = step_of(model, clip_BTCHW, "exact", state_ticks=10)
    step.make_optimizers(functools.partial(torch.optim.SGD, lr=0.1))
    step.step(clip_BTCHW[:1], labels_B[:1], lambda numbers: None)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("stride", "least"), [(1, 7), (2, 7), (3, 9)])
def test_the_shortest_clip_in_which_all_stages_of_a_strided_net_learn(stride: int, least: int) -> None:
    torch.manual_seed(0)
    model = Causal3d(stride).double().eval()
    step = step_of(model, random_clip(2, 20)[0], "sideways")
    step.make_optimizers(functools.partial(torch.optim.SGD, lr=0.1))
    for num_frames in range(least - 2, least + 2):
        clip_BTCHW, labels_B = random_clip(2, num_frames)
        step.step(clip_BTCHW, labels_B, lambda numbers: None)
        assert all(p.grad is not None for p in model.parameters()) == (num_frames >= least)
        for p in model.parameters():
            p.grad = None
    with pytest.raises(InputError, match=f"clip of {least - 1} frames is too short.*4 stages need {least} or more"):
        step_of(model, random_clip(2, least - 1)[0], "sideways")


def test_in_the_loop(tmp_path: Path) -> None:
    """Batch norm in train mode; resumed to the bit is what ``test_kill`` looks at."""
    torch.manual_seed(0)
    config = CONFIG.replace(epochs=1, rule="sideways", update="tick", state_ticks=2, num_stages=2)
    result = fit(Causal3d(), tiny_data(), tiny_data("test", 8), config=config, out=tmp_path / "run")
    assert result.test_accuracy is not None


def test_refusals() -> None:
    clip_BTCHW, _ = random_clip()
    with pytest.raises(InputError, match="the stream of Recurrent looks ahead, so that it answers 1 frames late"):
        step_of(recurrent(Conv3d(4, 4, 3, padding=1)), clip_BTCHW, "exact")
    dropping = recurrent(PerFrame(nn.Dropout(0.5)))
    with pytest.raises(CircuitError, match=r"draws random numbers \(dropout\).*use state_ticks=0"):
        step_of(dropping, clip_BTCHW, "sideways", num_stages=2, state_ticks=1)
