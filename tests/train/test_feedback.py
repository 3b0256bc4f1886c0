"""Random and direct feedback in training: every rule with every feedback, their gradients, and runs that resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from data.video_files import make_folder
from torch import Tensor, nn
from torch.nn import functional as F
from train.layered import gradients_of, layered, random_clip, step_of, still_clip

from sidestream.cli import main
from sidestream.data import ClipDataset, synthetic_dataset
from sidestream.errors import InputError
from sidestream.models.autoencoder import conv_autoencoder
from sidestream.models.vgg8 import simple_cnn
from sidestream.nn.feedback_alignment import with_random_feedback
from sidestream.nn.feedback_weights import Draw, ErrorFeedback
from sidestream.train import RULES as BY_NAME
from sidestream.train import StepContext, TrainConfig, fit
from sidestream.train.answering import Answering
from sidestream.train.skip_net import with_skips
from sidestream.types import InputSpec

RULES = ("backprop", "exact", "sideways")
SEED = 5


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)


def direct_by_hand(model: nn.Module, clip_BTCHW: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
    """Nøkland's formula, module by module: each goes back from B e by itself, and the last from e."""
    x = clip_BTCHW.flatten(0, 1)
    labels = labels_B.repeat_interleave(clip_BTCHW.shape[1])
    made = [x]
    for module in model.net:  # type: ignore[attr-defined]
        made.append(module(made[-1]).detach())
    probabilities = torch.softmax(made[-1], -1)
    error = (probabilities - F.one_hot(labels, made[-1].shape[1])) / len(labels)
    expected = {}
    for number, module in enumerate(model.net, start=1):  # type: ignore[attr-defined]
        sent = error
        if number < len(made) - 1:
            shape = (made[number][0].numel(), error.shape[1])
            sent = (error @ Draw(SEED)(f"stage {number}, output 0", shape, shape[0], error).T).view_as(made[number])
        found = torch.autograd.grad(module(made[number - 1]), list(module.parameters()), sent)
        names = [f"net.{number - 1}.{name}" for name, _ in module.named_parameters()]
        expected |= dict(zip(names, found, strict=True))
    return expected


@pytest.mark.parametrize("rule", ["backprop", "exact"])
def test_direct_feedback_is_nøklands_formula_for_both_rules(rule: str) -> None:
    model, given = layered(), random_clip()
    expected = direct_by_hand(model, *given)
    assert_same(gradients_of(model, *given, rule, feedback="direct", seed=SEED)[0], expected)
    own = gradients_of(model, *given, rule, seed=SEED)[0]
    assert torch.allclose(own["net.3.2.weight"], expected["net.3.2.weight"])
    assert not torch.allclose(own["net.0.0.weight"], expected["net.0.0.weight"])


@pytest.mark.parametrize("options", [{"rule": "sideways"}, {"rule": "exact"}, {"rule": "exact", "keep": "inputs"}])
def test_direct_feedback_on_still_clips_is_the_same_for_all_rules(options: dict[str, Any]) -> None:
    model, given = layered(), still_clip()
    expected, theirs = gradients_of(model, *given, "backprop", feedback="direct", seed=SEED)
    found, ours = gradients_of(model, *given, feedback="direct", seed=SEED, **options)
    assert_same(found, expected)
    assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_random_feedback_is_the_model_with_it(rule: str) -> None:
    """Plain backprop of ``with_random_feedback``; for Sideways on still clips."""
    given = still_clip() if rule == "sideways" else random_clip()
    model, theirs = layered(), with_random_feedback(layered(), seed=SEED)
    expected = gradients_of(theirs, *given, "backprop")[0]
    assert_same(gradients_of(model, *given, rule, feedback="random", seed=SEED)[0], expected)
    own = gradients_of(layered(), *given, rule)[0]
    assert not torch.allclose(own["net.0.0.weight"], expected["net.0.0.weight"])


def test_random_feedback_in_a_net_that_is_cut() -> None:
    torch.manual_seed(0)
    model = simple_cnn(4, width=0.1).double()
    given = random_clip(2, 5, 32)
    expected = gradients_of(with_random_feedback(copy.deepcopy(model), seed=SEED), *given, "backprop")[0]
    found = gradients_of(model, *given, "exact", num_stages=3, feedback="random", seed=SEED)[0]
    assert_same(found, expected)


@pytest.mark.parametrize("rule", ["exact", "sideways"])
@pytest.mark.parametrize("feedback", ["random", "direct"])
def test_both_executors_give_the_same_to_the_bit(rule: str, feedback: str) -> None:
    found = [
        gradients_of(layered(), *random_clip(), rule, feedback=feedback, executor=executor)[0]
        for executor in ("inline", "threads")
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_hooks_of_direct_feedback_are_gone_after_the_step() -> None:
    model, given = layered(), random_clip()
    gradients_of(model, *given, "backprop", feedback="direct")
    assert not any(module._forward_hooks for module in model.modules())
    assert_same(gradients_of(model, *given, "backprop")[0], gradients_of(layered(), *given, "backprop")[0])


class TestRefusals:
    def test_direct_feedback_needs_layers(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 9 * 64, 4)).double()
        with pytest.raises(InputError, match="does not say what its layers are"):
            step_of_plain(model)

    def test_direct_feedback_of_backprop_takes_no_skips(self) -> None:
        clip_BTCHW, labels_B = random_clip()
        net = with_skips(layered(), clip_BTCHW[:, 0], "add")
        with pytest.raises(InputError, match="or has skips between them"):
            step_of(net, clip_BTCHW, "backprop", feedback="direct")
        for rule in ("exact", "sideways"):
            found = gradients_of(net, clip_BTCHW, labels_B, rule, feedback="direct")[0]
            assert found.keys() == dict(net.named_parameters()).keys()

    @pytest.mark.parametrize(
        ("rule", "options", "says"),
        [
            ("exact", {"keep": "inputs and weights"}, "keep='inputs and weights' with feedback='direct'"),
            ("exact", {"state_ticks": 1}, "state_ticks=1 with feedback='direct'"),
        ],
    )
    def test_options_that_do_not_go_with_direct_feedback(self, rule: str, options: Any, says: str) -> None:
        with pytest.raises(InputError, match=says):
            step_of(layered(), random_clip()[0], rule, feedback="direct", **options)

    @pytest.mark.parametrize("rule", RULES)
    def test_answers_whose_matrices_would_be_too_large(self, rule: str) -> None:
        """Pictures of 3 x 128 x 128 to 4 x 64 x 64 numbers: 805 million; 3 GiB. Of 64 x 64 px: 50 million."""
        clip_BTCHW = torch.zeros(1, 4, 3, 128, 128)
        for size_px in (64, 128):
            model, clip = conv_autoencoder((4,)), clip_BTCHW[..., :size_px, :size_px]
            config = TrainConfig(rule=rule, task="autoencode", feedback="direct")
            context = StepContext(model, Answering(model, "autoencode"), config, torch.Tensor.backward, clip)
            if size_px == 64:
                BY_NAME[rule](context)
                continue
            says = "an answer of 49152 numbers to stage 1, 16384 numbers, .* 0.8 billion .3 GiB.*use feedback='random'"
            with pytest.raises(InputError, match=says):
                BY_NAME[rule](context)

    def test_a_matrix_that_is_too_large_is_not_drawn(self) -> None:
        output, error = torch.zeros(()).expand(1, 2**20), torch.zeros(()).expand(1, 2**10)
        with pytest.raises(InputError, match=r"a dense matrix of 1.1 billion \(4 GiB"):
            ErrorFeedback(Draw(0)).cotangent("stage 1", output, error)

    def test_clips_that_are_too_short(self) -> None:
        """Four stages have a gradient each from tick 4 on; under Sideways' own feedback from tick 6 on."""
        step_of(layered(), random_clip(num_frames=5)[0], "sideways", feedback="direct")
        with pytest.raises(InputError, match="4 stages need 5 or more"):
            step_of(layered(), random_clip(num_frames=4)[0], "sideways", feedback="direct")


def step_of_plain(model: nn.Module) -> None:
    config = TrainConfig(feedback="direct")
    BY_NAME["backprop"](StepContext(model, model, config, lambda loss: loss.backward()))


def small_data(part: str = "train", num_clips: int = 12) -> ClipDataset:
    spec = InputSpec(size_px=(32, 32), mean=(0.5,) * 3, std=(0.25,) * 3, layout="BTCHW", num_frames=9)
    return synthetic_dataset(part=part, spec=spec, num_clips=num_clips)


def small_fit(out: Path, *, resume: bool = False, **changes: Any) -> Any:
    torch.manual_seed(0)
    net = simple_cnn(4, width=0.1)
    config = TrainConfig(epochs=2, batch_size=6, lr=0.05, device="cpu", seed=3, num_workers=0).replace(**changes)
    return fit(net, small_data(), config=config, out=out, resume=resume)


@pytest.mark.parametrize("feedback", ["own", "random", "direct"])
@pytest.mark.parametrize("rule", RULES)
def test_a_run_of_every_rule_with_every_feedback(tmp_path: Path, rule: str, feedback: str) -> None:
    result = small_fit(tmp_path / "run", rule=rule, feedback=feedback)
    torch.manual_seed(0)
    before = simple_cnn(4, width=0.1)
    assert result.num_updates == 4
    for (name, a), b in zip(result.model.named_parameters(), before.parameters(), strict=True):
        assert a.isfinite().all(), name
        assert not torch.equal(a, b), name
    assert result.model.state_dict().keys() == before.state_dict().keys()
    assert {type(m) for m in result.model.modules()} == {type(m) for m in before.modules()}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("rule", "feedback", "update"),
    [("sideways", "direct", 3), ("sideways", "random", "clip"), ("backprop", "direct", "clip")],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, feedback: str, update: int | str
) -> None:
    from sidestream.train.loop import Loop

    changes = {"rule": rule, "feedback": feedback, "update": update, "checkpoint_minutes": 0.0}
    whole = small_fit(tmp_path / "whole", **changes).model
    plain, num_batches = Loop._batch, 0

    def stops(self: Loop, batch: Any) -> None:
        nonlocal num_batches
        num_batches += 1
        if num_batches == 3:
            raise KeyboardInterrupt
        plain(self, batch)

    monkeypatch.setattr(Loop, "_batch", stops)
    with pytest.raises(KeyboardInterrupt):
        small_fit(tmp_path / "parted", **changes)
    monkeypatch.setattr(Loop, "_batch", plain)
    resumed = small_fit(tmp_path / "parted", resume=True, **changes).model
    for (name, a), b in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_from_the_command_line(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "clips"), tmp_path / "run"
    words = "--model simple_cnn --num-frames 6 --size 32 --epochs 1 --batch-size 2 --device cpu --rule sideways"
    assert main(["train", "--data", str(folder), *words.split(), "--feedback", "direct", "--out", str(out)]) == 0
    assert '"feedback": "direct"' in (out / "config.json").read_text()
