"""The depth-parallel rules in the training loop: updates, resuming to the bit, refusals, losses that are NaN."""

from __future__ import annotations

import copy
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from train.layered import Layered, layered, random_clip, step_of
from train.tiny import CONFIG, tiny_data

from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.wiring import pipelined
from sidestream.data import ClipDataset, ClipOptions, synthetic_dataset
from sidestream.engine import run
from sidestream.engine.rules.sideways import Sideways
from sidestream.errors import InputError, TrainError
from sidestream.models import create_model
from sidestream.models.vgg8 import vgg8
from sidestream.models.weights import load_weights
from sidestream.report import read_json_lines
from sidestream.train import TrainConfig, TrainResult, fit, with_skips
from sidestream.train.checkpoint import load_checkpoint
from sidestream.types import InputSpec

SPEC = InputSpec(size_px=(12, 12), mean=(0.5,) * 3, std=(0.25,) * 3, layout="BTCHW", num_frames=9)


def data(part: Any = "train", num_clips: int = 18, **changes: Any) -> ClipDataset:
    return synthetic_dataset(part=part, spec=SPEC.replace(**changes), num_clips=num_clips, options=ClipOptions())


def net(seed: int = 0, **options: Any) -> Layered:
    torch.manual_seed(seed)
    return Layered(**options)


def layered_fit(out: Path, rule: str, *, resume: bool = False, model: nn.Module | None = None, **c: Any) -> TrainResult:
    config = CONFIG.replace(rule=rule, **{"epochs": 2, "lr": 0.02, **c})
    return fit(net() if model is None else model, data(), data("test", 8), config=config, out=out, resume=resume)


def same_files(a: Path, b: Path, name: str) -> bool:
    ours, theirs = load_file(a / name), load_file(b / name)
    return ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)


class StopsAt(Exception):
    """Raised in the middle of a run."""


class Stopping(Layered):
    """Fails at its n-th call in training mode; a call of a layer, so in the middle of a clip."""

    at = 0
    calls = 0

    def depth_modules(self) -> list[nn.Module]:
        def count(module: nn.Module, args: Any) -> None:
            self.calls += module.training
            if self.calls == self.at:
                raise KeyboardInterrupt

        self.net[1].register_forward_pre_hook(count)
        return super().depth_modules()


def slow(options: dict[str, Any]) -> Any:
    return pytest.param(options, marks=pytest.mark.slow)


RUNS: list[Any] = [
    slow({"rule": "exact"}),
    slow({"rule": "exact", "update": "tick", "keep": "inputs and weights", "optimizer": "adamw"}),
    slow({"rule": "sideways", "clip_norm": 0.1}),
    {"rule": "sideways", "update": "tick", "clip_norm": 0.1, "optimizer": "adamw"},
    {"rule": "sideways", "update": 5},
    slow({"rule": "sideways", "update": 7, "skips": "concat", "loss_delay": 1}),
    {"rule": "exact", "skips": "projection", "executor": "threads"},
]


@pytest.mark.parametrize("options", RUNS, ids=lambda o: " ".join(map(str, o.values())))
def test_a_run_that_is_broken_off_and_resumed_ends_as_an_unbroken_one(options: dict[str, Any], tmp_path: Path) -> None:
    """To the bit: weights, optimisers of all stages, and sums gathered between updates."""
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    norms = options.get("keep") is None  # going forward again does not repeat a batch norm
    torch.manual_seed(0)
    model = Stopping(batch_norm=norms)
    model.at = 9 * 4 + 5  # in the fifth batch
    with pytest.raises(KeyboardInterrupt):
        layered_fit(broken, model=model, **options)
    kept = load_file(broken / "checkpoint.safetensors")
    if type(options.get("update")) is int:  # ticks of four clips that are no multiple of it
        assert any(key.startswith("rule/") for key in kept)
    result = layered_fit(broken, resume=True, model=net(5, batch_norm=norms), **options)
    assert result.num_epochs == 2
    layered_fit(whole, model=net(0, batch_norm=norms), **options)
    assert same_files(broken, whole, "checkpoint.safetensors")
    assert same_files(broken, whole, "last.safetensors")
    before = net(0, batch_norm=norms).state_dict()
    after = load_file(whole / "last.safetensors")
    if options.get("skips") is None:
        assert not any(before[key].equal(after[key]) for key in before if key.endswith("weight")), "all layers moved"


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "exact"},
        {"rule": "sideways", "update": "tick"},
        {"rule": "sideways", "update": 5, "skips": "projection"},
    ],
)
def test_threads_train_the_same_weights_as_inline(options: dict[str, Any], tmp_path: Path) -> None:
    for executor in ("inline", "threads"):
        layered_fit(tmp_path / executor, executor=executor, epochs=1, **options)
    assert same_files(tmp_path / "inline", tmp_path / "threads", "last.safetensors")


def test_exact_once_per_clip_trains_as_backprop(tmp_path: Path) -> None:
    """Through the whole loop, with schedule, momentum, and two batches to an update; in float32."""
    for rule in ("exact", "backprop"):
        layered_fit(tmp_path / rule, rule, task="frame", accumulate=2)
    ours, theirs = (load_file(tmp_path / rule / "last.safetensors") for rule in ("exact", "backprop"))
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=2e-6, rtol=1e-4)
    logs = [read_json_lines(tmp_path / rule / "log.jsonl") for rule in ("exact", "backprop")]
    for a, b in zip(*logs, strict=True):
        assert a.get("lr") == b.get("lr")
        for name in ("loss", "train_loss", "test_loss"):
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), rel=1e-4)


@pytest.mark.parametrize("update", ["tick", 3])
def test_updates_in_mid_clip_are_those_of_the_rule_alone(update: int | str) -> None:
    """Two clips through the step, and through ``run`` with the rule made by hand."""
    model, (clip_BTCHW, labels_B) = layered(), random_clip()
    twin = copy.deepcopy(model)
    step = step_of(model, clip_BTCHW, "sideways", update=update, clip_norm=0.05)
    optimizers = step.make_optimizers(functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    assert len(optimizers) == 4
    clips = [clip_BTCHW, clip_BTCHW.flip(1)]
    for clip in clips:
        step.step(clip, labels_B, lambda numbers: pytest.fail("the stages step by themselves"))
    circuit = pipelined(stages_of(twin.depth_modules(), clip_BTCHW[:, 0]))
    make = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    rule = Sideways(F.cross_entropy, optimizers=make, update=update, max_norm=0.05)
    for clip in clips:
        list(run(circuit, [(frame, labels_B) for frame in clip.unbind(1)], rule=rule, executor="inline"))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert a.equal(b)
    assert not model.net[0][0].weight.equal(layered().net[0][0].weight)


def test_the_schedule_reaches_the_optimiser_of_every_stage(tmp_path: Path) -> None:
    seen: list[tuple[float, ...]] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append(tuple(group["lr"] for group in self.param_groups))
            return super().step(closure)

    model, (clip_BTCHW, labels_B) = layered(), random_clip()
    step = step_of(model, clip_BTCHW, "sideways", update="tick")
    optimizers = step.make_optimizers(lambda parameters: Watched(parameters, lr=1.0))
    for rate in (0.1, 0.01):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
        step.step(clip_BTCHW, labels_B, lambda numbers: None)
    num_ticks = sum(9 - 2 * (4 - i) for i in range(1, 5))
    assert seen == [(0.1,)] * num_ticks + [(0.01,)] * num_ticks


def test_what_is_written_says_everything_and_is_loaded_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"skips": "add", "update": 6, "target": "newest", "loss_delay": 1, "executor": "threads"}
    result = layered_fit(tmp_path / "run", "sideways", epochs=1, **options)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["train"].items() >= {"rule": "sideways", **options}.items()
    again = with_skips(net(3), torch.zeros(1, 3, 12, 12), "add").eval()
    clip_BTCHW = torch.randn(2, 5, 3, 12, 12)
    assert not torch.equal(again(clip_BTCHW), result.model(clip_BTCHW))
    load_weights(again, tmp_path / "run/last.safetensors")
    assert torch.equal(again(clip_BTCHW), result.model(clip_BTCHW))


@pytest.mark.slow
def test_an_image_model_of_another_library_with_batch_norm_and_a_short_last_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("timm/test_resnet", num_classes=4)
    before = copy.deepcopy(model.state_dict())
    parts = data(num_clips=6, size_px=(32, 32)), data("test", 4, size_px=(32, 32))
    config = CONFIG.replace(rule="sideways", update="tick", num_stages=3, batch_size=4, epochs=1)
    result = fit(model, *parts, config=config, out=tmp_path / "run")
    assert result.test_accuracy is not None
    moved = [key for key, value in model.state_dict().items() if not value.equal(before[key])]
    assert {key for key in before if key.endswith(("weight", "running_mean"))} <= set(moved)


class BreaksDown(Layered):
    """NaN in its last layer from the given call in training mode on."""

    first_bad = 9 * 4 + 2

    def depth_modules(self) -> list[nn.Module]:
        calls = [0]

        def spoil(module: nn.Module, args: Any, answer: torch.Tensor) -> torch.Tensor:
            calls[0] += module.training
            return answer * (math.nan if calls[0] >= self.first_bad else 1.0)

        self.net[-1].register_forward_hook(spoil)
        return super().depth_modules()


@pytest.mark.parametrize("options", [{"rule": "exact"}, {"rule": "sideways", "update": "tick"}])
def test_a_nan_loss_stops_the_run_and_the_last_good_checkpoint_stays(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(TrainError, match=r"the loss is nan in epoch 2, batch 2 \(first clip 'train/\d+'\).*lower lr"):
        layered_fit(tmp_path / "run", model=BreaksDown(), **options)
    assert all(value.isfinite().all() for value in load_file(tmp_path / "run/checkpoint.safetensors").values())
    layered_fit(tmp_path / "run", resume=True, **options)
    layered_fit(tmp_path / "whole", **options)
    assert same_files(tmp_path / "run", tmp_path / "whole", "last.safetensors")


@pytest.mark.parametrize("rule", ["exact", "sideways"])
def test_an_infinite_gradient_stops_before_any_update(rule: str) -> None:
    class Steep(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + (x * 0).abs().sqrt()  # as it was, with the slope of 1 / 0

    model, (clip_BTCHW, labels_B) = layered(), random_clip()
    model.net[2] = nn.Sequential(model.net[2], Steep())
    step = step_of(model, clip_BTCHW, rule)
    step.make_optimizers(functools.partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(ArithmeticError, match="the length of the gradient of stage 3 in tick"):
        step.step(clip_BTCHW, labels_B, lambda numbers: pytest.fail("no update"))


def test_labels_out_of_range() -> None:
    for rule in ("exact", "sideways"):
        model, (clip_BTCHW, labels_B) = layered(), random_clip()
        step = step_of(model, clip_BTCHW, rule)
        step.make_optimizers(functools.partial(torch.optim.SGD, lr=0.1))
        for wrong in (4, -1):
            with pytest.raises(InputError, match=f"label {wrong} is out of range: the net answers classes 0 to 3"):
                step.step(clip_BTCHW, torch.full_like(labels_B, wrong), lambda numbers: None)


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (
        lambda: net(1, num_layers=1, width=3),
        {"rule": "exact"},
        "Layered has 1 stage; depth-parallel training needs 2 or more",
    ),
    (lambda: net(1, num_layers=6), {"rule": "sideways"}, "clip of 9 frames is too short.*6 stages need 11 or more"),
    (lambda: net(1, num_layers=5), {"rule": "sideways", "loss_delay": 1}, "5 stages need 10 or more"),
    (lambda: net(1, num_layers=10), {"rule": "exact"}, "10 stages need 10 or more"),
    (lambda: net(1, num_layers=10), {"rule": "sideways", "skips": "projection"}, "10 stages need 10 or more"),
    (lambda: net(1, num_layers=2), {"rule": "sideways", "skips": "concat"}, "has 2 layers; the first skip"),
    (lambda: create_model("tsm_mobilenet_v2", num_classes=4), {"rule": "exact"}, "TSM looks ahead.* 10 frames late"),
    (lambda: vgg8(4, width=0.05), {"rule": "exact", "skips": "add"}, "frames of 12 x 12 px|use skips='projection'"),
    (net, {"rule": "exact", "update": "tick"}, "changes weights that a kept graph still needs"),
    (lambda: net(1, batch_norm=True).eval(), {"rule": "exact", "keep": "inputs"}, "would not repeat the first"),
    (net, {"rule": "exact", "loss_delay": 1}, "only 'sideways' knows it"),
    (net, {"rule": "sideways", "precision": "bf16"}, "it trains in float32"),
    (net, {"rule": "sideways", "update": 2, "accumulate": 2}, "it goes with update='clip'"),
    (nn.Flatten, {"rule": "exact"}, "no answers for single frames"),
    (lambda: vgg8(4, width=0.05), {"rule": "backprop", "skips": "add"}, "use skips='projection'"),
]


@pytest.mark.parametrize(("make", "options", "message"), REFUSED)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    make: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        layered_fit(tmp_path / "run", model=make(), **options)
    assert not (tmp_path / "run").exists()


def test_dropout_under_threads_and_whole_clip_models_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = vgg8(4, width=0.05, dropout=0.5)
    config = CONFIG.replace(rule="exact", executor="threads")
    with pytest.raises(InputError, match="not be resumed exactly"):
        fit(model, data(size_px=(32, 32)), config=config, out=tmp_path / "run")
    from train.tiny import tiny_net

    with pytest.raises(InputError, match="Tiny reads whole clips at once"):
        fit(tiny_net(), tiny_data(), config=CONFIG.replace(rule="exact"), out=tmp_path / "run")


@pytest.mark.parametrize("changes", [{"update": 0}, {"update": "never"}, {"num_stages": 1}, {"skips": "some"}])
def test_config_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(changes))} is"):
        TrainConfig(rule="sideways", **changes)


PASSED_OVER = [
    {"rule": "backprop", "update": "tick"},
    {"rule": "backprop", "keep": "inputs"},
    {"rule": "sideways", "keep": "inputs"},
    {"rule": "backprop", "loss_delay": 1},
    {"rule": "backprop", "executor": "threads"},
    {"rule": "backprop", "state_ticks": 1},
    {"rule": "backprop", "num_stages": 3},
    {"rule": "backprop", "target": "newest"},
    {"rule": "sideways", "bptt_frames": 2},
    {"rule": "backprop", "wiring": "sequential"},
    {"rule": "exact", "feedback_wire": True},
    {"rule": "backprop", "teacher": "net.safetensors"},
    {"rule": "backprop", "distill_frame": "newest"},
    {"rule": "unrolled", "update": 4},
    {"task": "autoencode", "horizon": 2},
]


@pytest.mark.parametrize("options", PASSED_OVER, ids=lambda o: " ".join(map(str, o.values())))
def test_options_that_a_rule_or_task_would_pass_over_are_refused(options: dict[str, Any]) -> None:
    (kind, mine), (name, value) = options.items()
    with pytest.raises(InputError, match=rf"{name}={value!r} with the {kind} '{mine}'; only '.*' knows? it"):
        TrainConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "sideways", "num_stages": 3, "skips": "projection"}, "num_stages=3 with skips"),
        ({"rule": "exact", "state_ticks": 2}, "state_ticks=2 with Layered, no stage of which has a state"),
    ],
)
def test_options_that_a_net_would_pass_over_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        layered_fit(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rule", ["backprop", "exact", "sideways"])
def test_a_net_without_a_parameter_to_train_is_refused(rule: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no parameter to train"):
        layered_fit(tmp_path / "run", rule, model=net().requires_grad_(False))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_without_a_rule_state_is_read(tmp_path: Path) -> None:
    layered_fit(tmp_path / "run", "backprop", epochs=1)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    position, rule_state = load_checkpoint(tmp_path / "run", model, [optimizer])
    assert (position["epoch"], rule_state) == (1, {})


@pytest.mark.parametrize(
    ("options", "num_frames"),
    [({}, 7), ({"loss_delay": 1}, 8), ({"skips": "add"}, 4), ({"skips": "add", "loss_delay": 1}, 5)],
)
def test_the_shortest_clip_that_is_taken_is_the_shortest_in_which_all_stages_learn(
    options: dict[str, Any], num_frames: int
) -> None:
    clip_BTCHW, labels_B = random_clip(2, num_frames)
    model = with_skips(layered(), clip_BTCHW[:, 0], options.get("skips", "none"))
    step = step_of(model, clip_BTCHW, "sideways", **options)
    step.make_optimizers(functools.partial(torch.optim.SGD, lr=0.1))
    step.step(clip_BTCHW, labels_B, lambda numbers: None)
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(InputError, match=f"clip of {num_frames - 1} frames is too short"):
        step_of(model, clip_BTCHW[:, 1:], "sideways", **options)
    step.step(clip_BTCHW[:, 1:], labels_B, lambda numbers: None)
    for p in model.parameters():
        p.grad = None
    step.step(clip_BTCHW[:, 1:], labels_B, lambda numbers: None)
    assert any(p.grad is None for p in model.parameters())
