"""Wrong inputs to training, whichever the rule: a clear error before anything is written, or a good checkpoint kept."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from train.killed import CONFIG, SPEC
from train.layered import NUM_CLASSES, Layered, layered, random_clip, step_of

from sidestream.cli import main
from sidestream.data import ClipDataset, ClipOptions, synthetic_dataset
from sidestream.errors import InputError, TrainError
from sidestream.train import TrainResult, fit

RULES: dict[str, dict[str, Any]] = {
    "backprop": {"rule": "backprop", "task": "frame"},
    "exact": {"rule": "exact"},
    "exact, every tick": {"rule": "exact", "update": "tick", "keep": "inputs"},
    "sideways": {"rule": "sideways", "update": "tick"},
    "sideways, every clip": {"rule": "sideways"},
}
any_rule = pytest.mark.parametrize("rule", RULES)
by_depth = pytest.mark.parametrize("rule", [name for name in RULES if name != "backprop"])


def net(num_layers: int = 3, **options: Any) -> Layered:
    torch.manual_seed(0)
    return Layered(num_layers, **options)


def data(part: Any = "train", num_clips: int = 12, **changes: Any) -> ClipDataset:
    return synthetic_dataset(part=part, spec=SPEC.replace(**changes), num_clips=num_clips, options=ClipOptions())


def trained(out: Path, rule: str, model: nn.Module, **options: Any) -> TrainResult:
    given = {"train_data": data(**options.pop("clips", {})), "resume": options.pop("resume", False)}
    return fit(model, config=CONFIG.replace(**{"epochs": 2, **RULES[rule], **options}), out=out, **given)


@by_depth
def test_a_net_of_one_stage(rule: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Layered has 1 stage; .* needs 2 or more: .*use the rule 'backprop'"):
        trained(tmp_path / "run", rule, net(1, width=3))
    assert not (tmp_path / "run").exists()


@by_depth
def test_a_clip_shorter_than_the_pipeline(rule: str, tmp_path: Path) -> None:
    least = 3 if rule.startswith("exact") else 5
    few = {"num_frames": least - 1}
    message = (
        rf"a clip of {least - 1} frames is too short .* 3 stages need {least} or more \(pipelined\); give longer clips"
    )
    with pytest.raises(InputError, match=message):
        trained(tmp_path / "run", rule, net(), clips=few)
    assert not (tmp_path / "run").exists()
    trained(tmp_path / "run", rule, net(), clips={"num_frames": least}, epochs=1)


@any_rule
def test_a_net_with_too_few_classes(rule: str, tmp_path: Path) -> None:
    model = net()
    model.net[-1][-1] = nn.Linear(4, NUM_CLASSES - 1)
    with pytest.raises(InputError, match=r"answers 3 classes, but the labels go from 0 to 3; make the model with num"):
        trained(tmp_path / "run", rule, model)
    assert not (tmp_path / "run").exists()


@any_rule
def test_labels_out_of_range_in_a_batch(rule: str) -> None:
    """As only a data set of one's own can bring them: ``ClipDataset`` looks at its labels."""
    model, (clip_BTCHW, labels_B) = layered(), random_clip()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = step_of(model, clip_BTCHW, **{k: v for k, v in RULES[rule].items() if k != "task"})
    step.make_optimizers(functools.partial(torch.optim.SGD, lr=0.1))
    for wrong in (NUM_CLASSES, -1):
        labels_B[1] = wrong
        with pytest.raises(InputError, match=f"label {wrong} is out of range: the net answers classes 0 to 3"):
            step.step(clip_BTCHW, labels_B, lambda numbers: pytest.fail("no update"))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


class BreaksDown(Layered):
    """Answers NaN from the given frame of training on."""

    first_bad_frame = 7 * 4 * 4 + 3 * 4
    num_frames = 0

    def break_down(self) -> BreaksDown:
        def spoil(module: nn.Module, args: Any, answer: torch.Tensor) -> torch.Tensor:
            self.num_frames += len(answer) if module.training else 0
            return answer * (math.nan if self.num_frames >= self.first_bad_frame else 1.0)

        self.net[-1].register_forward_hook(spoil)
        return self


@any_rule
def test_a_nan_loss_stops_the_run_and_the_last_good_checkpoint_is_gone_on_with(rule: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(TrainError, match=r"the loss is nan in epoch 2, batch 2 .*the last good checkpoint stays in"):
        trained(tmp_path / "run", rule, BreaksDown(3).break_down())
    for name in ("checkpoint.safetensors", "last.safetensors", "best.safetensors"):
        assert all(value.isfinite().all() for value in load_file(tmp_path / "run" / name).values()), name
    trained(tmp_path / "run", rule, net(), resume=True)
    trained(tmp_path / "whole", rule, net())
    ours, theirs = (load_file(tmp_path / f / "checkpoint.safetensors") for f in ("run", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)


COMMANDS = [
    (["--rule", "sideways", "--num-stages", "1"], "num_stages is 1; give 2 or more"),
    (["--rule", "exact", "--state-ticks", "-1"], "state_ticks is -1; give 0 or more"),
    (["--bptt-frames", "0"], "bptt_frames is 0; give 1 or more"),
    (["--bptt-frames", "4"], "bptt_frames=4 with task='clip'"),
    (["--rule", "sideways", "--num-frames", "6"], "a clip of 6 frames is too short for the pipeline"),
]


@pytest.mark.parametrize(("words", "message"), COMMANDS, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_on_the_command_line(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = ["--data", "synthetic", "--model", "simple_cnn", "--size", "32", "--device", "cpu", "--batch-size", "2"]
    clips = [] if "--num-frames" in words else ["--num-frames", "4"]
    assert main(["train", *run, *clips, *words, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
