"""The depth-parallel rules in the training step: their gradients against those of backprop, parameter by parameter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from train.layered import gradients_of, layered, random_clip, step_of, still_clip

from sidestream.engine import run
from sidestream.models.info import ModelInfo, attach_info
from sidestream.models.vgg8 import simple_cnn, vgg8
from sidestream.train import with_skips
from sidestream.types import InputSpec


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], atol: float = 1e-12) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(ours[name], gradient, atol=atol * max(1.0, scale), rtol=1e-9, msg=name)


def by_hand(model: Any, clip_BTCHW: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
    """Mean over frames of the cross entropy of the frame's logits, by autograd, frame by frame."""
    T = clip_BTCHW.shape[1]
    loss = torch.stack([F.cross_entropy(model.net(clip_BTCHW[:, t]), labels_B) for t in range(T)]).mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("keep", ["graph", "inputs", "inputs and weights"])
@pytest.mark.parametrize("executor", ["inline", "threads"])
def test_exact_is_backprop(keep: str, executor: str) -> None:
    model, given = layered(batch_norm=True).eval(), random_clip()
    expected, theirs = gradients_of(model, *given, "backprop")
    assert_same(expected, by_hand(model, *given))
    found, ours = gradients_of(model, *given, "exact", keep=keep, executor=executor)
    assert_same(found, expected)
    assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-6)
    assert ours["accuracy"] == theirs["accuracy"]


@pytest.mark.parametrize("make", [lambda: vgg8(4, width=0.05), lambda: simple_cnn(4, width=0.1)])
def test_exact_is_backprop_on_the_nets_of_the_papers(make: Any) -> None:
    torch.manual_seed(0)
    model, given = make().double(), random_clip(2, 9, 32)
    assert_same(gradients_of(model, *given, "exact")[0], by_hand(model, *given))


@pytest.mark.parametrize("loss_delay", [0, 1])
def test_sideways_on_still_clips_is_backprop(loss_delay: int) -> None:
    """Mean over the ticks that had a gradient: after fill-up each is that of the one frame."""
    model, given = layered(), still_clip()
    expected, theirs = gradients_of(model, *given, "backprop")
    found, ours = gradients_of(model, *given, "sideways", loss_delay=loss_delay)
    assert_same(found, expected)
    assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-6)


def test_sideways_on_moving_clips_differs_but_for_the_last_stage() -> None:
    model, given = layered(), random_clip()
    expected = gradients_of(model, *given, "backprop")[0]
    found = gradients_of(model, *given, "sideways")[0]
    last = {name for name in expected if name.startswith("net.3.")}
    assert_same({name: found[name] for name in last}, {name: expected[name] for name in last})
    for name in expected.keys() - last:
        assert not torch.allclose(found[name], expected[name], atol=1e-6), name


def test_the_newest_target_leaves_the_last_frames_out() -> None:
    """In a row of K, the last K - 1 frames are not answered; with a label per clip the others have the same loss."""
    model, (clip_BTCHW, labels_B) = layered(), random_clip()
    found = gradients_of(model, clip_BTCHW, labels_B, "exact", target="newest")[0]
    assert_same(found, by_hand(model, clip_BTCHW[:, :-3], labels_B))


def test_label_smoothing() -> None:
    model, given = layered(), random_clip()
    options = {"label_smoothing": 0.3}
    expected = gradients_of(model, *given, "backprop", **options)[0]
    assert_same(gradients_of(model, *given, "exact", **options)[0], expected)


@pytest.mark.parametrize("skips", ["add", "concat", "projection"])
class TestSkips:
    def net(self, skips: str) -> Any:
        torch.manual_seed(0)
        model = layered() if skips == "add" else vgg8(4, width=0.05).double()
        return with_skips(model, self.clip(skips)[0][:, 0], skips)

    def clip(self, skips: str) -> tuple[Tensor, Tensor]:
        return random_clip(2, 9, 8 if skips == "add" else 32)

    def test_the_clip_form_is_the_circuit(self, skips: str) -> None:
        net, (clip_BTCHW, _) = self.net(skips).eval(), self.clip(skips)
        outputs = list(run(net.circuit(), list(clip_BTCHW.unbind(1)), executor="inline"))
        answers_BTN = net.answers(clip_BTCHW)
        assert answers_BTN.shape == (2, len(outputs), 4)
        torch.testing.assert_close(torch.stack([o.value for o in outputs], 1), answers_BTN.detach())
        assert not torch.allclose(answers_BTN[:, 3], net.answers(clip_BTCHW[:, 3:4])[:, 0]), "skips see other frames"

    def test_exact_is_backprop_through_the_circuit(self, skips: str) -> None:
        net, given = self.net(skips), self.clip(skips)
        expected, theirs = gradients_of(net, *given, "backprop")
        found, ours = gradients_of(net, *given, "exact")
        assert_same(found, expected)
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-6)

    def test_skip_sideways_on_still_clips_is_backprop(self, skips: str) -> None:
        net, (clip_BTCHW, labels_B) = self.net(skips), self.clip(skips)
        still = clip_BTCHW[:, :1].repeat(1, 9, 1, 1, 1)
        expected = gradients_of(net, still, labels_B, "backprop")[0]
        assert_same(gradients_of(net, still, labels_B, "sideways")[0], expected)


@pytest.mark.parametrize("is_image_model", [True, False])
def test_a_net_that_is_cut_is_exact_too_and_short_batches_are_filled_up(is_image_model: bool) -> None:
    torch.manual_seed(0)
    model: Any = vgg8(4, width=0.05).double()
    theirs: Any = copy.deepcopy(model)
    if is_image_model:
        model = attach_info(model.net, ModelInfo("net", "sidestream", "image", InputSpec(size_px=(32, 32)), 4))
        theirs = theirs.net
    clip_BTCHW, labels_B = random_clip(3, 5, 32)
    step = step_of(model, clip_BTCHW, "exact", num_stages=3)
    assert step.circuit.num_stages == 3  # type: ignore[attr-defined]
    step.make_optimizers(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    metrics = step.step(clip_BTCHW[:2], labels_B[:2], lambda numbers: None)
    net = theirs if is_image_model else theirs.net
    loss = torch.stack([F.cross_entropy(net(clip_BTCHW[:2, t]), labels_B[:2]) for t in range(5)]).mean()
    loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    assert_same(ours, {name: p.grad for name, p in theirs.named_parameters()})
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-6)
