"""The rule "unrolled": loss and gradients against slow twins, distillation by hand, training, evaluation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train.layered import layered, random_clip
from train.predicting import densenet, slow_loss, slow_values

from sidestream.circuit.ages import latency_ticks
from sidestream.data import synthetic_dataset
from sidestream.engine.unroll import Trace, unroll
from sidestream.errors import InputError
from sidestream.models import create_model
from sidestream.models.heatmaps import gaussian_maps
from sidestream.models.parallel_densenet import ParDenseNet
from sidestream.models.weights import save_weights
from sidestream.train import RULES, StepContext, TrainConfig, fit
from sidestream.train.answering import Answering
from sidestream.train.predictive import LiveNet, Predictive, distillation, wired
from sidestream.train.tasks import KeypointTask
from sidestream.types import InputSpec


def step_of(model: nn.Module, clip: Tensor, **options: Any) -> Predictive:
    config = TrainConfig(**{"rule": "unrolled", "task": "frame", **options})
    step = RULES["unrolled"](StepContext(model, Answering(model, "frame"), config, lambda loss: loss.backward(), clip))
    assert isinstance(step, Predictive)
    return step


def stepped(model: nn.Module, clip: Tensor, labels: Tensor, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Gradients by name, and the metrics."""
    step = step_of(model, clip, **options)
    (optimizer,) = step.make_optimizers(lambda p: torch.optim.SGD(p, lr=0.1))
    asked: list[int] = []
    metrics = step.step(clip, labels, asked.extend)
    assert asked == [0]
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.zero_grad()
    return found, metrics


@pytest.mark.parametrize(
    ("wiring", "target", "distill"),
    [
        ("sequential", "answered", 0.0),
        ("pipelined", "newest", 0.7),
        ("semi-parallel:2:fresh", "answered", 0.7),
        ("parallel", "newest", 0.7),
        ("parallel", "answered", 0.0),
        ("parallel", "newest", 0.0),
    ],
)
def test_gradients_are_autograds_through_the_slow_twin(
    wiring: str, target: str, distill: float, tmp_path: Path
) -> None:
    clip, labels = random_clip(2, 6, 8)
    file = save_weights(densenet(1), tmp_path / "teacher.safetensors")
    net = densenet(0)
    options: dict[str, Any] = {"wiring": wiring, "target": target}
    if distill:
        options |= {"distill": distill, "teacher": str(file)}
        net.load_state_dict(densenet(1).state_dict())
    found, metrics = stepped(net, clip, labels, **options)
    teacher = wired(densenet(1), clip[:, 0], "sequential") if distill else None
    circuit = wired(net, clip[:, 0], wiring)
    expected = slow_loss(circuit, clip, labels, teacher=teacher, weight=distill, newest=target == "newest")
    torch.testing.assert_close(metrics["loss"], expected.detach(), rtol=1e-10, atol=1e-12)
    true = torch.autograd.grad(expected, list(net.parameters()), allow_unused=True)
    for (name, _), gradient in zip(net.named_parameters(), true, strict=True):
        assert (name in found) == (gradient is not None), name
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-10, msg=name)


def test_distillation_against_numbers_by_hand() -> None:
    """Two stages; stage 1 saw frames 0, 1 (ticks 0, 1), stage 2 the oldest 0 and the newest 1 in tick 1."""
    teacher = [
        Trace((torch.tensor([[[1.0], [2.0], [4.0]]]),), (0, 1, 2), (0, 1, 2), (0, 1, 2)),
        Trace((torch.tensor([[[10.0], [20.0], [40.0]]]),), (0, 1, 2), (0, 1, 2), (0, 1, 2)),
    ]
    student = [
        Trace((torch.tensor([[[1.5], [2.0]]]),), (0, 1), (0, 1), (0, 1)),
        Trace((torch.tensor([[[13.0], [7.0]]]),), (1, 2), (0, None), (1, None)),  # the second saw repeats only
    ]
    assert distillation(student, teacher).item() == pytest.approx((0.25 + 0.0) / 2 + 9.0)
    assert distillation(student, teacher, "newest").item() == pytest.approx((0.25 + 0.0) / 2 + 49.0)


def test_distance_is_zero_for_the_teacher_itself_where_no_ages_mix(tmp_path: Path) -> None:
    file = save_weights(densenet(1), tmp_path / "teacher.safetensors")
    clip, labels = random_clip(2, 6, 16)
    options: dict[str, Any] = {"teacher": str(file), "distill": 1.0}
    _, aligned = stepped(densenet(0), clip, labels, wiring="pipelined", **options)
    _, mixed = stepped(densenet(0), clip, labels, wiring="parallel", **options)
    _, mixed_newest = stepped(densenet(0), clip, labels, wiring="parallel", distill_frame="newest", **options)
    assert aligned["distillation"].item() < 1e-25
    assert mixed["distillation"].item() > 1e-6
    assert mixed_newest["distillation"].item() != pytest.approx(mixed["distillation"].item(), rel=1e-3)
    assert mixed["loss"].item() == pytest.approx((mixed["task_loss"] + mixed["distillation"]).item(), rel=1e-12)


def test_begins_with_the_sequential_weights_and_their_answers(tmp_path: Path) -> None:
    teacher = densenet(1)
    file = save_weights(teacher, tmp_path / "teacher.safetensors")
    clip, _ = random_clip(2, 6, 16)
    net = densenet(0)
    step = step_of(net, clip, wiring="semi-parallel:2", teacher=str(file), feedback_wire=True)
    assert net.has_feedback
    assert latency_ticks(step.circuit) == 1
    with torch.no_grad():
        found = unroll(step.circuit, clip, drain=False).answers
        torch.testing.assert_close(found, teacher.answers(clip)[:, :-1], rtol=1e-9, atol=1e-12)
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=0, atol=0)


def test_weights_with_feedback_are_asked_for_by_name(tmp_path: Path) -> None:
    clip, _ = random_clip(2, 6, 16)
    fed = densenet(1)
    fed.add_feedback()
    nn.init.normal_(fed.double().fed_module.feedback.weight)  # type: ignore[union-attr,arg-type]
    file = str(save_weights(fed, tmp_path / "fed.safetensors"))
    with pytest.raises(InputError, match="of a net with feedback; add feedback_wire"):
        step_of(densenet(), clip, teacher=file)
    net = densenet()
    step = step_of(net, clip, wiring="sequential", teacher=file, feedback_wire=True)
    with torch.no_grad():
        torch.testing.assert_close(unroll(step.circuit, clip).answers, fed.answers(clip))


def test_feedback_weights_learn(tmp_path: Path) -> None:
    clip, labels = random_clip(2, 6, 16)
    found, _ = stepped(densenet(), clip, labels, wiring="parallel", feedback_wire=True)
    assert found["stages.1.feedback.weight"].norm() > 0


def test_target_decides_which_points_count() -> None:
    """Heat maps: newest pairs the answer of tick t with frame t, answered with frame t - latency."""
    clip, _ = random_clip(2, 7, 16)
    generator = torch.Generator().manual_seed(5)
    points = torch.cat(
        [16 * torch.rand(2, 7, 3, 2, generator=generator, dtype=torch.float64), torch.ones(2, 7, 3, 1).double()], -1
    )
    for target in ("newest", "answered"):
        net = densenet(points=3)
        _, metrics = stepped(net, clip, points, wiring="parallel", target=target, task="keypoints")
        with torch.no_grad():
            made = slow_values(wired(net, clip[:, 0], "parallel"), clip, 7 if target == "newest" else 7 + 3)
        assert next(iter(made[-1])) == 3
        losses = []
        for t, maps in made[-1].items():
            frame = t if target == "newest" else t - 3
            wanted = gaussian_maps(points[:, frame, :, :2], (4, 4), 4.0, sigma_cells=1.0).flatten(2)
            wanted = wanted / wanted.sum(-1, keepdim=True)
            losses.append(-(wanted * maps.flatten(2).log_softmax(-1)).sum(-1).mean())
        assert len(losses) == (4 if target == "newest" else 7)
        assert metrics["loss"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-9)


def test_evaluation_pairs_answers_with_the_newest_frame() -> None:
    clip, _ = random_clip(2, 7, 16)
    net = densenet(points=3)
    step = step_of(net, clip, wiring="parallel", task="keypoints", target="answered")
    live, task = step.judged(net, KeypointTask(target="answered"))
    assert isinstance(live, LiveNet)
    task.align(step.circuit)
    assert task.lead == live.latency == 3  # type: ignore[attr-defined]
    with torch.no_grad():
        answers = live(clip)
        made = slow_values(step.circuit, clip, 7)
    assert answers.shape[:2] == (2, 4)
    torch.testing.assert_close(answers, torch.stack(list(made[-1].values()), 1))
    live.train()
    assert net.training


def test_nets_of_layers_and_their_batch_norms() -> None:
    """vgg8-like nets; in train mode a batch norm takes its statistics over clips and ticks together."""
    net = layered(batch_norm=True).train()
    clip, labels = random_clip(3, 6)
    circuit = wired(net, clip[:, 0], "parallel")
    assert net.training
    twin = copy.deepcopy(net)
    torch.testing.assert_close(unroll(circuit, clip, drain=False).answers, twin.answers(clip[:, :3]))
    for own, other in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(own, other)
    found, _ = stepped(net, clip, labels, wiring="parallel", target="newest")
    assert set(found) == {name for name, _ in net.named_parameters()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wiring": "spiral"}, "unknown wiring"),
        ({"feedback": "random"}, "goes back over the own"),
        ({"distill": 0.5}, "no teacher"),
        ({"distill": -0.5}, "distill is -0.5"),
        ({"distill_frame": "middle"}, "oldest, newest"),
        ({"teacher": "/nowhere.safetensors"}, "no weights file"),
    ],
)
def test_options_that_do_not_go(options: dict[str, Any], message: str) -> None:
    clip, _ = random_clip(2, 5, 16)
    with pytest.raises(InputError, match=message):
        step_of(densenet(), clip, **options)


def test_nets_and_clips_that_do_not_go() -> None:
    clip, _ = random_clip(2, 2, 16)
    with pytest.raises(InputError, match="clips of 2 frames end before"):
        step_of(densenet(), clip)
    with pytest.raises(InputError, match="does not say what its stages are"):
        step_of(create_model("cnn_gru", num_classes=4), clip)
    with pytest.raises(InputError, match="cannot be fed its last answer"):
        step_of(layered(), clip, feedback_wire=True)


def test_steps_lower_the_loss() -> None:
    clip, _ = random_clip(4, 6, 8)
    labels = torch.arange(4)
    net = densenet().train()
    step = step_of(net, clip, wiring="parallel", target="newest")
    (optimizer,) = step.make_optimizers(lambda p: torch.optim.Adam(p, lr=0.02))

    def update(numbers: Any) -> None:
        optimizer.step()
        optimizer.zero_grad()

    losses = [step.step(clip, labels, update)["loss"].item() for _ in range(25)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_run_is_evaluated_as_the_circuit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = InputSpec(size_px=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3, layout="BTCHW", num_frames=6)
    data = [synthetic_dataset(part=p, spec=spec, num_clips=8) for p in ("train", "test")]  # type: ignore[arg-type]
    net = ParDenseNet(data[0].num_classes, stages=(3, 1), growth=2, stem=4, bottleneck=2, num_layers=1)
    config = TrainConfig(
        epochs=1,
        batch_size=4,
        lr=0.01,
        rule="unrolled",
        wiring="parallel",
        target="newest",
        device="cpu",
        num_workers=0,
    )
    result = fit(net, data[0], data[1], config=config, out=tmp_path / "run")
    clip = torch.stack([data[1][n].clip_TCHW for n in range(len(data[1]))])
    labels = torch.tensor([data[1][n].label for n in range(len(data[1]))])
    with torch.no_grad():
        made = slow_values(wired(net.eval(), clip[:, 0], "parallel"), clip, 6)
    logits = torch.stack(list(made[-1].values()), 1)
    assert logits.shape[1] == 3
    expected = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(3)).item()
    assert result.test_scores["loss"] == pytest.approx(expected, rel=1e-4)
    assert result.test_accuracy == pytest.approx((logits.mean(1).argmax(1) == labels).double().mean().item())
