"""par-DenseNet's circuits under "exact" and "sideways": autograd, a slow twin, still videos, runs, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train.layered import layered, random_clip
from train.predicting import NUM_CLASSES, densenet, slow_loss, slow_sideways

from sidestream.circuit.ages import latency_ticks, mixes_ages
from sidestream.circuit.net_stages import net_circuit
from sidestream.data import synthetic_dataset
from sidestream.engine import run
from sidestream.errors import InputError
from sidestream.models import create_model, load_weights
from sidestream.models.parallel_densenet import ParDenseNet
from sidestream.models.parallel_inception import ParInception
from sidestream.train import RULES, StepContext, TrainConfig, fit
from sidestream.train.answering import Answering
from sidestream.train.depth_parallel import DepthParallel
from sidestream.train.predictive import LiveNet
from sidestream.train.tasks import KeypointTask
from sidestream.types import InputSpec

WIRINGS = ["sequential", "pipelined", "semi-parallel:2", "semi-parallel:3:fresh", "parallel"]


def step_of(model: nn.Module, clip: Tensor, **options: Any) -> DepthParallel:
    config = TrainConfig(**{"rule": "sideways", "task": "frame", **options})
    context = StepContext(model, Answering(model, "frame"), config, lambda loss: loss.backward(), clip)
    step = RULES[config.rule](context)
    assert isinstance(step, DepthParallel)
    return step


def gradients_of(model: nn.Module, clip: Tensor, labels: Tensor, **options: Any) -> dict[str, Tensor]:
    step = step_of(model, clip, **options)
    for optimizer in step.make_optimizers(lambda p: torch.optim.SGD(p, lr=0.1)):
        optimizer.zero_grad()
    step.step(clip, labels, lambda numbers: None)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("target", ["answered", "newest"])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_exact_is_autograd_through_the_slow_twin(wiring: str, target: str) -> None:
    """Though deep stages read frames of several ages, and stages of one group the same frame in one tick."""
    clip, labels = random_clip(2, 7, 16)
    net = densenet()
    found = gradients_of(net, clip, labels, rule="exact", wiring=wiring, target=target)
    loss = slow_loss(net_circuit(net, clip[:, 0], wiring), clip, labels, newest=target == "newest")
    true = torch.autograd.grad(loss, list(net.parameters()))
    assert_close(found, {name: g for (name, _), g in zip(net.named_parameters(), true, strict=True)})


@pytest.mark.parametrize("executor", ["inline", "threads"])
@pytest.mark.parametrize("target", ["answered", "newest"])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_sideways_equals_a_slow_twin_on_a_moving_video(wiring: str, target: str, executor: str) -> None:
    clip, labels = random_clip(2, 9, 16)
    net = densenet()
    circuit = net_circuit(net, clip[:, 0], wiring)
    assert mixes_ages(circuit) == (wiring in ("parallel", "semi-parallel:3:fresh"))
    expected = slow_sideways(circuit, clip, labels, newest=target == "newest")
    found = gradients_of(net, clip, labels, wiring=wiring, target=target, executor=executor)
    of_parameter = {id(p): name for name, p in net.named_parameters()}
    names = {
        f"{number}.{name}": of_parameter[id(p)]
        for number, stage in enumerate(circuit.stages, start=1)
        for name, p in stage.module.named_parameters()  # type: ignore[union-attr]
    }
    assert_close(found, {names[name]: gradient for name, gradient in expected.items()})
    true = torch.autograd.grad(slow_loss(circuit, clip, labels, newest=target == "newest"), list(net.parameters()))
    apart = [(g - found[n]).abs().max() for (n, _), g in zip(net.named_parameters(), true, strict=True)]
    assert max(apart) > 1e-3  # approximate: the video moves


@pytest.mark.parametrize("wiring", WIRINGS)
def test_sideways_on_a_still_video_is_backprop_of_the_net(wiring: str) -> None:
    clip, labels = random_clip(2, 1, 16)
    net = densenet()
    true = torch.autograd.grad(F.cross_entropy(net.answers(clip)[:, 0], labels), list(net.parameters()))
    found = gradients_of(net, clip.expand(-1, 12, -1, -1, -1), labels, wiring=wiring)
    assert_close(found, {name: g for (name, _), g in zip(net.named_parameters(), true, strict=True)})


def test_shortest_clip_of_which_every_stage_learns() -> None:
    """4 stages: there and back is 7 ticks in a row; 3 of them after the clip where the last frame is repeated."""
    shortest = {"sequential": 4, "pipelined": 7, "semi-parallel:2": 5, "semi-parallel:3:fresh": 4, "parallel": 4}
    for wiring, num_frames in shortest.items():
        clip, labels = random_clip(2, num_frames, 16)
        net = densenet()
        assert len(gradients_of(net, clip, labels, wiring=wiring)) == len(list(net.parameters())), wiring
        with pytest.raises(InputError, match=f"need {num_frames} or more"):
            step_of(net, clip[:, 1:], wiring=wiring)


def test_par_inceptions_stages_keep_their_states() -> None:
    """Its convolutions look back in time; no gradient crosses that state, and one that does is asked for."""
    torch.manual_seed(0)
    net = ParInception(NUM_CLASSES, width=1 / 32).double().eval()
    clip, labels = random_clip(1, 20, 32)
    loss = F.cross_entropy(net.answers(clip).flatten(0, 1), labels.repeat_interleave(20))
    true = torch.autograd.grad(loss, list(net.parameters()))
    expected = {name: g for (name, _), g in zip(net.named_parameters(), true, strict=True)}
    assert_close(gradients_of(net, clip, labels, rule="exact", wiring="parallel", state_ticks=20), expected)
    none = gradients_of(net, clip, labels, rule="exact", wiring="parallel")
    some = gradients_of(net, clip, labels, rule="exact", wiring="parallel", state_ticks=2)
    errors = [sum((found[n] - expected[n]).square().sum() for n in expected) for found in (none, some)]
    assert errors[0] > errors[1] > 1e-6
    assert gradients_of(net, clip, labels, wiring="parallel").keys() == expected.keys()


def test_a_short_batch_is_taken_as_it_is() -> None:
    """Stages take any number of clips, so that nothing is filled up."""
    clip, labels = random_clip(3, 7, 16)
    net = densenet()
    step = step_of(net, clip, rule="exact", wiring="parallel")
    for optimizer in step.make_optimizers(lambda p: torch.optim.SGD(p, lr=0.1)):
        optimizer.zero_grad()
    step.step(clip[:1], labels[:1], lambda numbers: None)
    loss = slow_loss(net_circuit(net, clip[:1, 0], "parallel"), clip[:1], labels[:1], newest=False)
    true = torch.autograd.grad(loss, list(net.parameters()))
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert_close(found, {name: g for (name, _), g in zip(net.named_parameters(), true, strict=True)})


def test_diagnosis_of_a_circuit_that_mixes_frames() -> None:
    clip, labels = random_clip(2, 12, 16)
    still = clip[:, :1].expand_as(clip).contiguous()
    for shown, is_right in ((clip, False), (still, True)):
        step = step_of(densenet(), shown, wiring="parallel", diagnose=1)
        step.make_optimizers(lambda p: torch.optim.SGD(p, lr=0.1))
        records = step.diagnose(shown, labels)
        assert [r["stage"] for r in records] == [1, 2, 3, 4]
        assert all((r["cosine"] > 1 - 1e-9) == is_right for r in records[:3])
        assert records[3]["cosine"] > 1 - 1e-9  # the last stage has no lag


@pytest.mark.parametrize("feedback", ["random", "direct"])
def test_with_feedback_alignment_the_last_stage_still_has_the_true_gradient(feedback: str) -> None:
    clip, labels = random_clip(2, 1, 16)
    net = densenet()
    true = torch.autograd.grad(F.cross_entropy(net.answers(clip)[:, 0], labels), list(net.parameters()))
    expected = {name: g for (name, _), g in zip(net.named_parameters(), true, strict=True)}
    found = gradients_of(net, clip.expand(-1, 12, -1, -1, -1), labels, wiring="parallel", feedback=feedback)
    assert found.keys() == expected.keys()
    is_true = {name: torch.allclose(found[name], expected[name], rtol=1e-7, atol=1e-11) for name in expected}
    assert all(is_true[name] for name in expected if name.startswith("head."))
    assert not any(is_true[name] for name in expected if name.startswith("stages.0."))


def test_evaluation_is_of_the_newest_frame_in_the_wiring_that_was_trained() -> None:
    clip, _ = random_clip(2, 9, 16)
    net = densenet(points=3)
    step = step_of(net, clip, wiring="semi-parallel:3:fresh", task="keypoints", target="answered")
    live, task = step.judged(net, KeypointTask(target="answered"))
    assert isinstance(live, LiveNet)
    assert (live.circuit.wiring, task.target) == (step.circuit.wiring, "newest")  # type: ignore[attr-defined]
    assert live.latency == 2


@pytest.mark.parametrize(
    ("rule", "wiring"), [("exact", "parallel"), ("sideways", "parallel"), ("sideways", "semi-parallel:2")]
)
def test_a_run_is_evaluated_as_the_circuit(rule: str, wiring: str, tmp_path: Path) -> None:
    """By the engine, frame by frame, from the weights that the run has left."""
    spec = InputSpec(size_px=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3, layout="BTCHW", num_frames=6)
    data = [synthetic_dataset(part=p, spec=spec, num_clips=8) for p in ("train", "test")]  # type: ignore[arg-type]

    def fresh() -> ParDenseNet:
        torch.manual_seed(0)
        return ParDenseNet(data[0].num_classes, stages=(3, 1), growth=2, stem=4, bottleneck=2, num_layers=1)

    options: dict[str, Any] = {"epochs": 1, "batch_size": 4, "lr": 0.05, "device": "cpu", "num_workers": 0}
    config = TrainConfig(rule=rule, wiring=wiring, target="newest", **options)
    result = fit(fresh(), data[0], data[1], config=config, out=tmp_path / "run")
    net = load_weights(fresh(), tmp_path / "run" / "last.safetensors").eval()
    assert any(not p.equal(q) for p, q in zip(net.parameters(), fresh().parameters(), strict=True))
    circuit = net_circuit(net, data[1][0].clip_TCHW[:1], wiring)
    losses, num_right = [], 0
    for n in range(len(data[1])):
        item, latency = data[1][n], latency_ticks(circuit)
        answers = [o.value for o in run(circuit, list(item.clip_TCHW[:, None]), executor="inline")]
        seen = torch.cat(answers[: len(item.clip_TCHW) - latency])  # the rest comes when the clip is over
        losses += [F.cross_entropy(row[None], torch.tensor([item.label])).item() for row in seen]
        num_right += int(seen.mean(0).argmax()) == item.label
    assert len(losses) == (6 - latency_ticks(circuit)) * 8
    assert result.test_scores["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert result.test_accuracy == num_right / 8


@pytest.mark.parametrize("wiring", ["semi-parallel:3:fresh", "parallel"])
def test_steps_lower_the_loss(wiring: str) -> None:
    clip, _ = random_clip(4, 10, 8)
    clip = clip[:, :1] + 0.1 * clip  # little changes from frame to frame
    labels = torch.arange(4)
    net = densenet().train()
    step = step_of(net, clip, wiring=wiring, target="newest")
    optimizers = step.make_optimizers(lambda p: torch.optim.Adam(p, lr=0.02))

    def update(numbers: Any) -> None:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    losses = [step.step(clip, labels, update)["loss"].item() for _ in range(25)]
    assert losses[-1] < 0.5 * losses[0]


def test_what_does_not_go() -> None:
    clip, _ = random_clip(2, 12, 16)
    with pytest.raises(InputError, match="unknown wiring"):
        step_of(densenet(), clip, wiring="spiral")
    with pytest.raises(InputError, match="'semi-parallel:2' on Layered"):
        step_of(layered(), clip, wiring="semi-parallel:2")
    for wiring in ("semi-parallel:2", "parallel"):
        with pytest.raises(InputError, match="cut into 2 stages; the rule 'sideways' wires"):
            step_of(densenet(), clip, wiring=wiring, num_stages=2)
    fed = densenet()
    fed.add_feedback()
    with pytest.raises(InputError, match="goes back over no feedback wire"):
        step_of(fed.double(), clip)
    with pytest.raises(InputError, match="with the rule 'backprop'; only 'exact', 'sideways', 'unrolled' know it"):
        TrainConfig(rule="backprop", wiring="pipelined")


def test_cut_by_cost_where_a_number_of_stages_is_given() -> None:
    """As other nets are: pipelined, and evaluated as it is."""
    clip, _ = random_clip(2, 12, 16)
    net = create_model("par_densenet_tiny", num_classes=NUM_CLASSES).double()
    step = step_of(net, clip, num_stages=2)
    assert (step.circuit.num_stages, step.circuit.wiring) == (2, "pipelined")
    task = object()
    assert step.judged(net, task) == (net, task)  # type: ignore[arg-type,comparison-overlap]
