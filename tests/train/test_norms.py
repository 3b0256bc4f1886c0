"""``freeze_norms``: statistics stay, weights learn, under every rule; and then all rules with true gradients agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train.layered import random_clip
from train.predicting import densenet

from sidestream.data import synthetic_dataset
from sidestream.errors import InputError
from sidestream.models import create_model
from sidestream.models.info import ModelInfo, attach_info
from sidestream.models.parallel_densenet import ParDenseNet
from sidestream.train import RULES, StepContext, TrainConfig, fit
from sidestream.train.answering import Answering
from sidestream.train.folder import RunFolder, read_config
from sidestream.train.norms import to_train_mode
from sidestream.train.predictive import LiveNet
from sidestream.types import InputSpec

SPEC = InputSpec(size_px=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3, layout="BTCHW", num_frames=9)


def with_statistics(net: nn.Module) -> nn.Module:
    """Batch norms that are not as they begin."""
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(m.running_mean, -0.3, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(m.running_var, 0.7, 1.5)  # type: ignore[arg-type]
    return net


def par_densenet(num_classes: int) -> nn.Module:
    return ParDenseNet(num_classes, stages=(3, 1), growth=2, stem=4, bottleneck=2, num_layers=1)


def frame_net(num_classes: int) -> nn.Module:
    """Cut into two stages, on its own input spec."""
    layers = (nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    net = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
    return attach_info(net, ModelInfo("tiny", "sidestream", "image", SPEC.replace(layout="BCHW"), num_classes))


CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("backprop", par_densenet, {}),
    ("unrolled", par_densenet, {"feedback_wire": True}),
    ("exact", par_densenet, {"wiring": "parallel"}),
    ("sideways", par_densenet, {"wiring": "parallel"}),
    ("sideways", frame_net, {"num_stages": 2}),
]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("rule", "make", "options"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_statistics_stay_and_weights_learn(
    rule: str, make: Any, options: dict[str, Any], frozen: bool, tmp_path: Path
) -> None:
    data = [synthetic_dataset(part=p, spec=SPEC, num_clips=8) for p in ("train", "test")]  # type: ignore[arg-type]
    torch.manual_seed(0)
    net = with_statistics(make(data[0].num_classes))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    plain: dict[str, Any] = {"epochs": 2, "batch_size": 4, "lr": 0.05, "device": "cpu", "num_workers": 0}
    config = TrainConfig(rule=rule, freeze_norms=frozen, **plain, **options)
    fit(net, data[0], data[1], config=config, out=tmp_path / "run")
    after = net.state_dict()
    statistics = [name for name in before if "running_" in name or "num_batches" in name]
    assert len(statistics) >= 6
    assert all(before[name].equal(after[name]) for name in statistics) == frozen
    norms = [f"{name}.weight" for name, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(not before[name].equal(after[name]) for name in norms)


def gradients(net: nn.Module, clip: Tensor, labels: Tensor, **options: Any) -> dict[str, Tensor]:
    config = TrainConfig(task="frame", wiring="parallel", target="newest", **options)
    step = RULES[config.rule](StepContext(net, Answering(net, "frame"), config, lambda loss: loss.backward(), clip))
    to_train_mode(net, freeze_norms=True)
    made = step.make_optimizers(lambda p: torch.optim.SGD(p, lr=0.1))
    step.step(clip, labels, lambda numbers: None)
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    for optimizer in made:
        optimizer.zero_grad()
    return found


def test_exact_and_unrolled_have_the_same_gradients() -> None:
    """Else their norms see one tick, and all ticks."""
    clip, labels = random_clip(3, 9, 16)
    net = with_statistics(densenet())
    by_tick, at_once = (gradients(net, clip, labels, rule=rule) for rule in ("exact", "unrolled"))
    assert by_tick.keys() == at_once.keys() == {name for name, _ in net.named_parameters()}
    for name, gradient in at_once.items():
        torch.testing.assert_close(by_tick[name], gradient, rtol=1e-7, atol=1e-11)


def test_train_mode_but_for_the_norms() -> None:
    net = create_model("simple_cnn", num_classes=3)
    net.add_module("norm", nn.BatchNorm3d(3))
    net.add_module("drop", nn.Dropout())
    to_train_mode(net, freeze_norms=True)
    modes = {type(m).__name__: m.training for m in net.modules()}
    assert modes.pop("BatchNorm3d") is False
    assert modes["Dropout"]
    assert net.training
    assert all(m.training for m in to_train_mode(net, freeze_norms=False).modules())


def test_a_net_without_such_norms_is_refused(tmp_path: Path) -> None:
    data = synthetic_dataset(part="train", spec=SPEC.replace(size_px=(32, 32)), num_clips=4)
    net = create_model("simple_cnn", num_classes=data.num_classes)
    net.add_module("norm", nn.BatchNorm3d(3, track_running_stats=False))
    config = TrainConfig(freeze_norms=True, epochs=1, batch_size=2, device="cpu", num_workers=0)
    with pytest.raises(
        InputError, match=r"freeze_norms, but the net has no batch norm that keeps statistics; leave it"
    ):
        fit(net, data, config=config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_live_net_keeps_the_modes_of_its_model() -> None:
    net = to_train_mode(densenet(), freeze_norms=True)
    live = LiveNet(net, torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    assert live.training
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(m.training for m in norms)


def test_a_run_is_resumed_with_the_norms_and_the_wiring_that_it_has(tmp_path: Path) -> None:
    """No wiring is the parallel one; an option that is newer than the run had its default."""
    folder = RunFolder(tmp_path / "run", resume=False)
    config = TrainConfig(rule="unrolled", task="keypoints")
    folder.start(config, {})
    folder.check_same(config.replace(wiring="parallel"))
    with pytest.raises(InputError, match=r"wiring \(was 'parallel', now 'sequential'\)"):
        folder.check_same(config.replace(wiring="sequential"))
    with pytest.raises(InputError, match=r"freeze_norms \(was False, now True\)"):
        folder.check_same(config.replace(freeze_norms=True))
    content = read_config(folder.path)
    del content["train"]["freeze_norms"]
    (folder.path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    folder.check_same(config)
    with pytest.raises(InputError, match=r"freeze_norms \(was False, now True\)"):
        folder.check_same(config.replace(freeze_norms=True))
