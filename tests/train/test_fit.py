"""``fit``: equal to a plain loop, learns, stops where it must, and what it leaves behind."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from train.tiny import CONFIG, Tiny, tiny_data, tiny_fit, tiny_net

from sidestream.data import Loader, synthetic_dataset
from sidestream.errors import InputError, TrainError
from sidestream.models.weights import load_weights
from sidestream.report import read_json_lines
from sidestream.train import TrainConfig, fit
from sidestream.types import InputSpec


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_fit_is_the_plain_loop(tmp_path: Path, clip_norm: float | None, one_thread: None) -> None:
    """With constant rate and no dropout: a loop in plain PyTorch on the same batches gives the same weights, to the
    bit; with clipping nearly so, since the norm is summed in another order."""
    ours, theirs = tiny_net(dropout=0.0), tiny_net(dropout=0.0)
    config = CONFIG.replace(schedule="constant", warmup_epochs=0.0, weight_decay=0.0, clip_norm=clip_norm, epochs=2)
    fit(ours, tiny_data(), config=config, out=tmp_path / "run")
    optimizer = torch.optim.SGD(theirs.parameters(), lr=config.lr, momentum=0.9, nesterov=True)
    loader = Loader(tiny_data(), batch_size=8, seed=config.seed, num_workers=0)
    for epoch in range(2):
        for batch in loader.batches(epoch):
            optimizer.zero_grad()
            F.cross_entropy(theirs(batch.clip_BTCHW), batch.labels_B).backward()
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm)
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.equal(b) if clip_norm is None else torch.allclose(a, b, atol=1e-6)
    assert not same(ours, tiny_net(dropout=0.0))


def test_two_half_batches_accumulated_are_one_batch(tmp_path: Path) -> None:
    class Plain(nn.Sequential):  # no batch norm, which sees another batch
        def __init__(self) -> None:
            torch.manual_seed(0)
            super().__init__(nn.Flatten(), nn.Linear(4 * 3 * 16 * 16, 4))

    nets = Plain(), Plain()
    for n, (net, size, accumulate) in enumerate(zip(nets, (8, 4), (1, 2), strict=True)):
        config = CONFIG.replace(batch_size=size, accumulate=accumulate, epochs=2, lr=0.01)
        result = fit(net, tiny_data(), config=config, out=tmp_path / str(n))
        assert result.num_updates == 10
    assert torch.allclose(nets[0][1].weight, nets[1][1].weight, atol=1e-6)


def test_the_batches_left_over_at_the_end_of_an_epoch_make_an_update(tmp_path: Path, one_thread: None) -> None:
    """5 batches, 2 an update: the third update of an epoch has one batch, which counts as much as any other."""
    ours, theirs = tiny_net(dropout=0.0), tiny_net(dropout=0.0)
    changes = {"schedule": "constant", "warmup_epochs": 0.0, "weight_decay": 0.0, "clip_norm": None}
    config = CONFIG.replace(accumulate=2, epochs=2, **changes)
    assert fit(ours, tiny_data(), config=config, out=tmp_path / "run").num_updates == 6
    optimizer = torch.optim.SGD(theirs.parameters(), lr=config.lr, momentum=0.9, nesterov=True)
    for epoch in range(2):
        batches = list(Loader(tiny_data(), batch_size=8, seed=config.seed, num_workers=0).batches(epoch))
        for numbers in ((0, 1), (2, 3), (4,)):
            optimizer.zero_grad()
            for n in numbers:
                (F.cross_entropy(theirs(batches[n].clip_BTCHW), batches[n].labels_B) / 2).backward()
            optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_every_epoch_counts_its_own_clips_only(tmp_path: Path) -> None:
    """A net that always answers class 0: its loss and its accuracy on 40 clips are those of chance, epoch by epoch."""
    result = tiny_fit(tmp_path / "run", epochs=3, net=Frozen())
    labels = [record.label for record in tiny_data().records]
    assert [r["train_accuracy"] for r in result.history] == pytest.approx([labels.count(0) / 40] * 3)
    assert [r["train_loss"] for r in result.history] == pytest.approx([math.log(4)] * 3, rel=1e-5)


def test_it_learns_which_way_a_shape_goes(tmp_path: Path) -> None:
    """Four directions: chance is 0.25, with a standard error of 0.034 on 160 clips."""
    spec = InputSpec(size_px=(24, 24), mean=(0.5,) * 3, std=(0.25,) * 3, layout="BTCHW", num_frames=6)
    parts = [synthetic_dataset(part=part, spec=spec, num_clips=n) for part, n in (("train", 240), ("test", 160))]
    torch.manual_seed(0)
    early = nn.Sequential(nn.Flatten(1, 2), nn.Conv2d(18, 24, 5, 2, 2), nn.BatchNorm2d(24), nn.ReLU())
    late = nn.Sequential(nn.Conv2d(24, 24, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 36, 4))
    config = TrainConfig(epochs=8, batch_size=16, lr=0.02, device="cpu")
    result = fit(nn.Sequential(early, late), *parts, config=config, out=tmp_path / "run")
    assert result.test_accuracy is not None
    assert result.test_accuracy > 0.4


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    net = tiny_net()
    result = tiny_fit(out, net=net, epochs=2)
    names = {path.name for path in out.iterdir()}
    wanted = {"config.json", "log.jsonl", "last.safetensors", "best.safetensors", "checkpoint.safetensors"}
    assert wanted <= names <= wanted | {"curve.png"}
    config = json.loads((out / "config.json").read_text())
    assert TrainConfig.from_dict(config["train"]) == CONFIG.replace(epochs=2)
    assert config["train_data"]["num_clips"] == 40
    assert config["class_names"] == ["right", "left", "down", "up"]
    assert same(load_weights(tiny_net(9), out / "last.safetensors").eval(), net)
    epochs = [record for record in read_json_lines(out / "log.jsonl") if record["kind"] == "epoch"]
    assert epochs == list(result.history)
    assert [record["updates"] for record in epochs] == [5, 10]
    assert all(record["test_records"] == 16 for record in epochs)
    assert result.best_test_accuracy == max(record["test_accuracy"] for record in epochs)
    assert not net.training


def test_the_best_weights_are_those_of_the_best_epoch(tmp_path: Path) -> None:
    tiny_fit(tmp_path / "long", epochs=4, schedule="constant", patience=None)
    accuracies = [r["test_accuracy"] for r in read_json_lines(tmp_path / "long/log.jsonl") if r["kind"] == "epoch"]
    best = accuracies.index(max(accuracies)) + 1
    tiny_fit(tmp_path / "short", epochs=best, schedule="constant")
    ours, theirs = load_file(tmp_path / "long/best.safetensors"), load_file(tmp_path / "short/last.safetensors")
    assert all(ours[key].equal(theirs[key]) for key in ours)


def test_early_stop(tmp_path: Path) -> None:
    """A rate too small to change an answer: the first epoch stays the best."""
    result = tiny_fit(tmp_path / "run", epochs=9, lr=1e-12, patience=2, net=Frozen())
    assert result.num_epochs == 3


def test_only_an_evaluated_epoch_ends_a_run_early(tmp_path: Path) -> None:
    """Epochs 2, 4 and 6 are evaluated; the first of them stays the best, and the run has accuracies of its end."""
    result = tiny_fit(tmp_path / "run", epochs=9, lr=1e-12, patience=3, evaluate_every=2, net=Frozen())
    assert result.num_epochs == 6
    assert [r.get("test_accuracy") is not None for r in result.history] == [False, True] * 3


def test_every_third_epoch_is_evaluated_and_the_last(tmp_path: Path) -> None:
    result = tiny_fit(tmp_path / "run", epochs=5, evaluate_every=3)
    assert [r.get("test_accuracy") is not None for r in result.history] == [False, False, True, False, True]


class Frozen(Tiny):
    """Answers class 0, whatever it is given."""

    def answers(self, clip_BTCHW: torch.Tensor) -> torch.Tensor:
        return super().answers(clip_BTCHW) * 0.0


class BreaksDown(Tiny):
    """Its answers are NaN from the eighth training batch on."""

    num_batches = 0

    def answers(self, clip_BTCHW: torch.Tensor) -> torch.Tensor:
        self.num_batches += self.training
        return super().answers(clip_BTCHW) * (math.nan if self.num_batches > 7 else 1.0)


def breaks_down() -> Tiny:
    torch.manual_seed(0)
    return BreaksDown()


def test_a_loss_that_is_nan_stops_the_run_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"the loss is nan in epoch 2, batch 3 \(first clip 'train/\d+'\).*lower lr"):
        tiny_fit(tmp_path / "run", net=breaks_down())
    kept = load_file(tmp_path / "run/checkpoint.safetensors")
    assert all(value.isfinite().all() for value in kept.values())
    result = tiny_fit(tmp_path / "run", resume=True)
    tiny_fit(tmp_path / "whole")
    assert result.num_epochs == 3
    ours, theirs = (load_file(tmp_path / name / "last.safetensors") for name in ("run", "whole"))
    assert all(ours[key].equal(theirs[key]) for key in ours)


def test_a_gradient_that_is_infinite_stops_the_run(tmp_path: Path) -> None:
    class Steep(Tiny):
        def answers(self, clip_BTCHW: torch.Tensor) -> torch.Tensor:
            return super().answers(clip_BTCHW) + (self.head.bias * 0).sqrt().sum()  # 0, with the slope of 1 / 0

    with pytest.raises(TrainError, match="the length of the gradient is"):
        tiny_fit(tmp_path / "run", net=Steep())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_loss_of_every_frame(tmp_path: Path, precision: str, one_thread: None) -> None:
    """The first batch's loss of the task "frame" is that of its definition."""
    net = tiny_net(dropout=0.0)
    config = CONFIG.replace(task="frame", epochs=1, precision=precision)
    batch = next(Loader(tiny_data(), batch_size=8, seed=config.seed).batches(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits_BTN = tiny_net(dropout=0.0).answers(batch.clip_BTCHW).float()
    wanted = sum(F.cross_entropy(logits_BTN[:, t], batch.labels_B) for t in range(4)) / 4
    fit(net, tiny_data(), config=config, out=tmp_path / "run")
    first = read_json_lines(tmp_path / "run/log.jsonl")[0]
    assert first["loss"] == pytest.approx(float(wanted), rel=1e-5)


def test_a_frame_model_is_put_on_every_frame(tmp_path: Path) -> None:
    from sidestream.models.info import ModelInfo, attach_info

    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    attach_info(net, ModelInfo("frames", "sidestream", "image", InputSpec(size_px=(16, 16)), 4))
    batch = next(Loader(tiny_data(), batch_size=8, seed=3).batches(0))
    logits_BN = torch.stack([net(batch.clip_BTCHW[:, t]) for t in range(4)]).mean(0)
    fit(net, tiny_data(), config=CONFIG.replace(epochs=1), out=tmp_path / "run")
    first = read_json_lines(tmp_path / "run/log.jsonl")[0]
    assert first["loss"] == pytest.approx(F.cross_entropy(logits_BN, batch.labels_B).item(), rel=1e-5)


class WantsEight(Tiny):
    """A model that has a use for eight frames only."""

    def answers(self, clip_BTCHW: torch.Tensor) -> torch.Tensor:
        return super().answers(clip_BTCHW.reshape(-1, 8, 3, 16, 16))


@pytest.mark.parametrize(
    ("net", "changes", "message"),
    [
        (lambda: tiny_net(num_classes=3), {}, r"answers 3 classes, but the labels go from 0 to 3.*num_classes=4"),
        (lambda: nn.Linear(3, 4), {}, r"does not take clips of shape \(2, 4, 3, 16, 16\)"),
        (WantsEight, {}, r"WantsEight answers \(1, 1, 4\), not one row"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)), {"task": "frame"}, "no answers for single frames"),
        (tiny_net, {"rule": "sideways-down"}, "no training rule 'sideways-down'; there are: backprop"),
        (tiny_net, {"optimizer": "lbfgs"}, "no optimizer 'lbfgs' that can be used here; there are .*sgd"),
        (tiny_net, {"optimizer_options": {"speed": 3}}, "does not take .*speed"),
        (lambda: tiny_net().requires_grad_(False), {}, "no parameter to train"),
    ],
)
def test_wrong_inputs(tmp_path: Path, net, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_fit(tmp_path / "run", net=net(), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"warmup_epochs": 4.0, "epochs": 3}, "warmup_epochs is 4, but there are 3 epochs"),
        ({"precision": "fp8"}, "precision is 'fp8'; expected one of no, bf16, fp16"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"patience": 0}, "patience"),
    ],
)
def test_wrong_options(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(**changes)


def test_half_precision_without_a_scaler_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="precision='fp16' on 'cpu', where gradients are not scaled"):
        tiny_fit(tmp_path / "run", precision="fp16")
    assert not (tmp_path / "run").exists()


def test_a_folder_holds_one_run_and_a_resumed_run_keeps_its_options(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(InputError, match="no run to resume"):
        tiny_fit(out, resume=True)
    tiny_fit(out, epochs=1)
    before = (out / "last.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds a run already; resume it"):
        tiny_fit(out, epochs=1)
    with pytest.raises(InputError, match=r"epochs \(was 1, now 2\), lr \(was 0.05, now 0.1\)"):
        tiny_fit(out, resume=True, epochs=2, lr=0.1)
    with pytest.raises(InputError, match="one of another model"):
        tiny_fit(out, resume=True, epochs=1, net=tiny_net(width=7))
    assert (out / "last.safetensors").read_bytes() == before
    assert tiny_fit(out, resume=True, epochs=1, num_workers=0).num_updates == 5
    assert (out / "last.safetensors").read_bytes() == before
