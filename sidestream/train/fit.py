"""``fit``: train a model on labelled clips, with any rule; leaves a folder from which the run can be resumed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sidestream.data import ClipDataset, Loader
from sidestream.errors import InputError
from sidestream.report import machine
from sidestream.train.answering import Answering, check_model
from sidestream.train.checkpoint import NAME as CHECKPOINT
from sidestream.train.config import ON_CIRCUITS, TrainConfig
from sidestream.train.feedback import take_feedback
from sidestream.train.folder import SAMPLES, RunFolder
from sidestream.train.hardware import make_accelerator
from sidestream.train.loop import Loop
from sidestream.train.norms import to_train_mode
from sidestream.train.optimisers import make_optimizer, optimizer_class
from sidestream.train.progress import progress
from sidestream.train.rules import StepContext, judged, rule_by_name
from sidestream.train.samples import draw_samples
from sidestream.train.short_convolutions import no_short_convolutions
from sidestream.train.skip_net import with_skips
from sidestream.train.tasks import Task, make_task


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run came to; the same stands in its log."""

    out: Path
    num_epochs: int
    """Epochs that were done: fewer than asked for where it stopped early."""
    num_updates: int
    """Of the learning rate: batches / ``accumulate``. With ``bptt_frames``, and ``update`` other than "clip", there are
    several of the weights within each."""
    seconds: float
    """Of the whole run, over all the times it was resumed."""
    test_accuracy: float | None
    """Top-1 of the last weights on the test part; None without one, and for tasks without classes."""
    best_test_accuracy: float | None
    """Of the best epoch's: chosen on the test part, so no estimate for unseen clips."""
    test_scores: dict[str, float]
    """Everything that the last evaluation found, by name: loss, accuracy; mse, psnr; pck_0.2 ... (``train.tasks``)."""
    score: str
    """The one of them that decides which epoch is the best; higher is better."""
    history: tuple[dict[str, Any], ...]
    """One record per epoch: train_loss, train_accuracy, test_loss, test_accuracy, seconds ..."""
    skipped: dict[str, str]
    """Records that could not be read, and why."""
    model: nn.Module
    """What was trained: the model that was given, or that with its skip wires."""


def fit(
    model: nn.Module,
    train_data: ClipDataset,
    test_data: ClipDataset | None = None,
    *,
    config: TrainConfig,
    out: str | os.PathLike[str],
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train ``model`` in place; at the end it has the last weights and is in eval mode.

    Args:
        model: clips (B, T, 3, H, W), or frames (B, 3, H, W) with an input spec that says so, to logits.
        test_data: evaluated after every epoch.
        out: folder for config.json, log.jsonl, last.safetensors, best.safetensors, checkpoint.safetensors, curve.png;
            with ``config.diagnose`` also diagnostics.jsonl and diagnostics.png.
        resume: go on with the run in ``out``, which must have been begun with the same configuration and data; one
            that was killed before its first checkpoint begins anew, with the weights that ``model`` has.
        about: what else to write into config.json (how the model and the data were made). Plain values.

    BatchNorm works as usual in training: statistics of the batch's clips and frames together; under the rules that go
    frame by frame, of the batch's clips at one frame (``Sideways`` says what that means).

    Raises:
        InputError: a model that does not take the clips, labels that it does not answer, an unknown rule or
            optimiser, ``out`` holds a run already (or none, to resume), or the run was begun with other options.
        TrainError: the loss is NaN or infinite; the last checkpoint stays.
    """
    make_rule = rule_by_name(config.rule)
    optimizer_class(config.optimizer)
    task = make_task(config, train_data.spec)
    folder = RunFolder(out, resume=resume)
    if resume:
        folder.check_same(config)
    accelerator = make_accelerator(config)
    _check_processes(config, accelerator.num_processes)
    loaders = _loaders(train_data, test_data, config, (accelerator.process_index, accelerator.num_processes))
    example_BTCHW = next(loaders[0].batches(0)).clip_BTCHW
    model = with_skips(model, example_BTCHW[:, 0], config.skips)
    net = Answering(model, config.answers_task)
    net.to(accelerator.device)
    example_BTCHW = example_BTCHW.to(accelerator.device)
    num_outputs = _num_outputs(train_data, config)
    clip_BTCHW = example_BTCHW[:2]
    with no_short_convolutions(net, config.precision, accelerator.device):
        check_model(net, clip_BTCHW, lambda name, answers: task.check_answers(name, answers, clip_BTCHW, num_outputs))
    to_train_mode(net, freeze_norms=config.freeze_norms)
    prepared = accelerator.prepare(net)  # rules look at it as it will be trained
    rule = make_rule(StepContext(model, prepared, config, accelerator.backward, example_BTCHW, task))
    task.check_clips(model, example_BTCHW.shape[1])
    if config.diagnose and not hasattr(rule, "diagnose"):
        raise InputError(
            f"diagnose={config.diagnose} with the rule {config.rule!r}; only 'exact' and 'sideways' are looked at"
        )
    optimizers = rule.make_optimizers(lambda parameters: accelerator.prepare(make_optimizer(parameters, config)))
    if not resume and accelerator.is_main_process:
        folder.start(config, _about(model, train_data, test_data) | dict(about or {}))
    accelerator.wait_for_everyone()
    loop = Loop(
        accelerator=accelerator,
        net=prepared,
        rule=rule,
        optimizers=optimizers,
        loaders=loaders,
        config=config,
        folder=folder,
        task=task,
    )
    if resume and (folder.path / CHECKPOINT).is_file():
        loop.resume()
    if test_data is not None:
        task.learn(Loader(train_data, batch_size=config.batch_size, seed=config.seed, num_workers=config.num_workers))
    is_main = accelerator.is_main_process
    with progress(loop.num_batches, folder.path, tensorboard=config.tensorboard, is_main=is_main) as report:
        loop.run(report)
    take_feedback(model.eval(), config)
    if is_main:
        title = f"{type(model).__name__}, {config.rule}"
        folder.draw(f"{title}, {train_data.name}", task.score)
        shown, shown_task = judged(rule, net, task)
        _draw_samples(shown_task, shown, loaders[1] or loaders[0], accelerator.device, folder, title)
    return _result(loop, train_data, test_data)


def _check_processes(config: TrainConfig, num_processes: int) -> None:
    if config.rule in ON_CIRCUITS and num_processes > 1:
        raise InputError(f"the rule {config.rule!r} trains in one process, but {num_processes} were started")


def _num_outputs(train_data: ClipDataset, config: TrainConfig) -> int:
    if config.task != "keypoints":
        return train_data.num_classes
    if train_data.points is None:
        raise InputError(
            f"{train_data.name} was opened without keypoints, which the task 'keypoints' needs; open it with "
            "with_points=True (jhmdb, synthetic)"
        )
    return len(train_data.points.names)


def _loaders(
    train_data: ClipDataset, test_data: ClipDataset | None, config: TrainConfig, shard: tuple[int, int]
) -> tuple[Loader, Loader | None]:
    if test_data is not None and test_data.class_names != train_data.class_names:
        raise InputError(
            f"the classes of {test_data.name} ({test_data.num_classes}) are not those of {train_data.name} "
            f"({train_data.num_classes}); give two parts of one data set"
        )
    sizes: dict[str, Any] = {"batch_size": config.batch_size, "num_workers": config.num_workers, "shard": shard}
    train_loader = Loader(train_data, seed=config.seed, shuffle=True, **sizes)
    return train_loader, None if test_data is None else Loader(test_data, shuffle=False, **sizes)


def _draw_samples(task: Task, net: nn.Module, loader: Loader, device: Any, folder: RunFolder, title: str) -> None:
    if rows := task.panels(net.eval(), next(loader.batches(0)), device):
        draw_samples(rows, folder.path / SAMPLES, title=f"{title}, {loader.dataset.name}")


def _about(model: nn.Module, train_data: ClipDataset, test_data: ClipDataset | None) -> dict[str, Any]:
    return {
        "model_class": type(model).__name__,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "train_data": {"name": train_data.name, "num_clips": len(train_data)},
        "test_data": None if test_data is None else {"name": test_data.name, "num_clips": len(test_data)},
        "class_names": list(train_data.class_names),
        "num_frames": train_data.spec.num_frames,
        "frame_step": train_data.spec.frame_step,
        "size_px": list(train_data.spec.size_px),
        "machine": machine(),
    }


def _result(loop: Loop, train_data: ClipDataset, test_data: ClipDataset | None) -> TrainResult:
    history = loop.folder.epochs()
    accuracies = [r["test_accuracy"] for r in history if r.get("test_accuracy") is not None]
    scored: dict[str, Any] = next((r for r in reversed(history) if "test_loss" in r), {})
    scores = {n.removeprefix("test_"): value for n, value in scored.items() if n.startswith("test_")}
    return TrainResult(
        out=loop.folder.path,
        num_epochs=loop.at.epoch,
        num_updates=loop.at.num_updates,
        seconds=loop.at.seconds,
        test_accuracy=accuracies[-1] if accuracies else None,
        best_test_accuracy=max(accuracies) if accuracies else None,
        test_scores={name: value for name, value in scores.items() if name != "records"},
        score=loop.task.score,
        history=tuple(history),
        skipped={**train_data.skipped, **(test_data.skipped if test_data is not None else {})},
        model=loop.model,
    )
