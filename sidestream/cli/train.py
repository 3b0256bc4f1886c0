"""``sidestream train``: a model by name, trained on labelled clips; leaves a folder from which it can be resumed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from sidestream.errors import InputError

FRAMES_OF_FRAME_MODELS = 8
"""Frames of a clip, of which a frame model reads each by itself and the logits are averaged."""


def train(
    data: str | None = None,
    model: str | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    num_frames: int | None = None,
    size: int | None = None,
    frame_step: int | None = None,
    epochs: int = 20,
    lr: float = 0.01,
    batch_size: int = 16,
    seed: int = 0,
    rule: str = "backprop",
    skips: Literal["none", "add", "concat", "projection"] = "none",
    update: str = "clip",
    target: Literal["answered", "newest"] = "answered",
    loss_delay: int = 0,
    keep: Literal["graph", "inputs", "inputs and weights"] = "graph",
    executor: Literal["inline", "threads"] = "inline",
    num_stages: int | None = None,
    feedback: Literal["own", "random", "direct"] = "own",
    state_ticks: int = 0,
    bptt_frames: int | None = None,
    task: Literal["clip", "frame", "autoencode", "future", "keypoints"] = "clip",
    horizon: int = 1,
    diagnose: int = 0,
    optimizer: str = "sgd",
    weight_decay: float = 1e-4,
    warmup_epochs: float = 1.0,
    clip_norm: float | None = None,
    label_smoothing: float = 0.0,
    accumulate: int = 1,
    freeze_norms: bool = False,
    precision: Literal["no", "bf16", "fp16"] = "no",
    device: Literal["auto", "cpu"] = "auto",
    patience: int | None = None,
    weights: str | None = None,
    split: str | None = None,
    root: Path | None = None,
    crop: bool = False,
    flip: bool = False,
    cache_mib: int = 512,
    num_workers: int = 2,
    checkpoint_minutes: float = 5.0,
    tensorboard: bool = False,
    wiring: str | None = None,
    feedback_wire: bool = False,
    teacher: str | None = None,
    distill: float = 0.0,
    distill_frame: Literal["oldest", "newest"] = "oldest",
) -> int:
    """Train a model on labelled clips: a folder of class-named folders, a CSV manifest, or a data set by name.

    Writes RUN/config.json, log.jsonl, last.safetensors, best.safetensors, checkpoint.safetensors and curve.png, and
    for the tasks that draw or find keypoints samples.png. A run
    that was stopped, in whatever way, is taken up with `sidestream train --resume RUN`, and ends with the weights that
    it would have had.

    Args:
        data: a folder, a .csv (path,label[,start_seconds,end_seconds][,split]), or jhmdb, weizmann, synthetic,
            synthetic_shapes, synthetic_both.
        model: a name from `sidestream models`, or the folder of a saved model, whose weights are what it starts from.
        out: folder of the new run.
        resume: folder of a run to go on with; everything else is taken from it.
        num_frames: frames of a clip (default: the model's own).
        size: height and width of the frames in pixels (default: the model's own).
        frame_step: distance of a clip's frames in the video (default: the model's own).
        epochs: passes over the training clips.
        lr: largest learning rate; it warms up to it and falls along a cosine.
        batch_size: clips of a batch.
        seed: of the initial weights, the clips, their order and dropout.
        rule: who computes the gradients: backprop, or in stages side by side, frame by frame: exact (the same
            gradients) or sideways (without waiting; right where frames change slowly); or unrolled, through the net as
            the circuit that it will run as (par_densenet, par_inception, vgg8 ...).
        skips: none, or how each layer joins the output of the layer before the last: add (simple_cnn), concat,
            projection (also vgg8, conv_autoencoder, keypoint_cnn).
        update: exact, sideways: once per clip (a batch of clips), every tick, or every N ticks.
        target: exact, sideways: of the frame that is answered, or of the newest.
        loss_delay: sideways: 1 takes the loss one tick later.
        keep: exact: graph, inputs (goes forward again), or inputs and weights.
        executor: exact, sideways: inline or threads.
        num_stages: exact, sideways: cut into so many stages (default: one per layer where the model says which).
        feedback: gradients go back over the layers' own weights, over fixed random ones (feedback alignment), or
            over fixed random ones straight from the loss to every stage (direct).
        state_ticks: exact, sideways: over how many ticks a gradient crosses the state of a stage.
        bptt_frames: backprop: truncated, with an update every so many frames (default: the whole clip).
        task: clip (the loss of the clip's logits) or frame (of every frame's; always so with exact and sideways);
            autoencode, future (draw the frame, or one to come; conv_autoencoder); keypoints (heat maps; keypoint_cnn,
            or any clip model, which gets such a head; jhmdb and synthetic).
        horizon: future: how many frames after the newest one that was seen.
        diagnose: compare the gradients with the true ones in every so many batches (default: never).
        optimizer: any of torch.optim by name.
        weight_decay: of weights, not of biases and norms.
        warmup_epochs: epochs in which the learning rate rises.
        clip_norm: longest gradient.
        label_smoothing: share of each label that is spread over all classes.
        accumulate: batches whose gradients make one update.
        freeze_norms: batch norms keep the statistics that they begin with (for --weights to start from).
        precision: no (float32), bf16 or fp16.
        device: auto (a GPU where there is one) or cpu.
        patience: stop after so many epochs without a better test score.
        weights: to start from: random (as without this), default (the library's own), or a file.
        split: of a data set by name: jhmdb 1, 2 or 3; weizmann the held-out actors, such as daria,eli.
        root: folder that holds the data sets by name (default: the environment variable SIDESTREAM_DATA).
        crop: train on random crops.
        flip: mirror half of the training clips.
        cache_mib: memory for decoded clips of each part, in MiB.
        num_workers: decoding threads.
        checkpoint_minutes: time between checkpoints within an epoch.
        tensorboard: write a TensorBoard log too.
        wiring: unrolled, and exact and sideways with par_densenet and par_inception: sequential, pipelined, parallel,
            semi-parallel:G or semi-parallel:G:fresh (G groups); default: parallel.
        feedback_wire: unrolled: the last answer goes back into an early stage (par_densenet, par_inception).
        teacher: unrolled: weights file of the sequential net, to start from and to distil from.
        distill: unrolled: weight of the distance to the teacher's activations.
        distill_frame: unrolled: which frame of those that a stage has seen the teacher is asked about.
    """
    given = dict(locals())
    if resume is not None:
        return _run(resume, _saved_options(resume, given), is_resumed=True)
    missing = [f"--{name}" for name in ("data", "model", "out") if given[name] is None]
    if missing:
        raise InputError(f"{', '.join(missing)} missing; give --data, --model and --out for a new run, or --resume RUN")
    assert out is not None  # is one of the three
    return _run(out, given, is_resumed=False)


def _saved_options(run: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The options that the run was begun with. Of those given now only what changes no value counts."""
    from sidestream.train.folder import FREE_TO_CHANGE, read_config

    defaults = _defaults()
    changed = {n for n, value in given.items() if n != "resume" and value != defaults[n]}
    if fixed := changed - FREE_TO_CHANGE:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(fixed))
        raise InputError(f"{names} given beside --resume; a resumed run keeps the options that it was begun with")
    options = read_config(run).get("command")
    if not isinstance(options, dict):
        raise InputError(f"{run}/config.json has no 'command': the run was begun from Python; resume it with fit(...)")
    return {**defaults, **options, **{name: given[name] for name in changed}}


def _defaults() -> dict[str, Any]:
    import inspect

    return {name: parameter.default for name, parameter in inspect.signature(train).parameters.items()}


def _run(out: Path, options: dict[str, Any], *, is_resumed: bool) -> int:
    from sidestream.train import TrainConfig, fit
    from sidestream.train.folder import RunFolder
    from sidestream.train.hardware import seed_all
    from sidestream.train.rules import rule_by_name

    logging.getLogger("sidestream").setLevel(logging.INFO)
    chosen = {name: options[name] for name in TrainConfig.__dataclass_fields__ if name in options}
    chosen["update"] = int(chosen["update"]) if chosen["update"].isdecimal() else chosen["update"]
    config = TrainConfig(**chosen)
    rule_by_name(config.rule)
    RunFolder(out, resume=is_resumed)  # refuses before the work
    info = _info(options["model"], options["weights"])
    train_data, test_data = _data(options, info.input_spec)
    seed_all(config.seed)
    net = _model(options["model"], info, config.task, train_data, options["weights"])
    plain = {name: str(v) if isinstance(v, Path) else v for name, v in options.items() if name not in ("resume", "out")}
    result = fit(net, train_data, test_data, config=config, out=out, resume=is_resumed, about={"command": plain})
    scores = _final_scores(result.test_scores)
    skipped = f", {len(result.skipped)} unreadable clips skipped" if result.skipped else ""
    epochs = f"{result.num_epochs} epoch{'s' * (result.num_epochs != 1)}"
    print(f"{options['model']} on {options['data']}: {epochs}{scores}{skipped}; {out}")
    return 0


TASKS_OF = {"pictures": ("autoencode", "future"), "keypoints": ("keypoints",)}
"""What a model answers by itself -> the tasks that it can be trained for."""
SHOWN = {"accuracy": "accuracy", "psnr": "PSNR", "pck_0.1": "PCK@0.1", "pck_0.2": "PCK@0.2", "error_px": "error"}
"""Scores of the last line, and what they are called there."""
BASELINES = ("repeat_psnr", "mean_frame_psnr", "mean_pose_pck_0.2")


def _final_scores(scores: dict[str, float]) -> str:
    """For the last line: what the net came to, and in brackets what answers that need no net come to."""
    own = "".join(f", test {title} {_number(name, scores[name])}" for name, title in SHOWN.items() if name in scores)
    others = []
    for name in BASELINES:
        if name in scores:
            score = next(each for each in SHOWN if name.endswith(f"_{each}"))
            others.append(f"{name.removesuffix(f'_{score}').replace('_', ' ')} {_number(score, scores[name])}")
    return own + (f" ({', '.join(others)})" if others else "")


def _number(name: str, value: float) -> str:
    units = {"psnr": (2, " dB"), "error_px": (2, " px")}
    digits, unit = units.get(name, (4, ""))
    return f"{value:.{digits}f}{unit}"


def _info(name: str, weights: str | None) -> Any:
    """Of a name, or of a saved model's folder, which has weights of its own."""
    from sidestream.models import info_of
    from sidestream.models.create import is_saved, model_info
    from sidestream.models.pretrained import from_pretrained

    if not is_saved(name):
        return model_info(name)
    if weights is not None:
        raise InputError(f"{name} has weights of its own, but --weights {weights} was given; leave one of them out")
    return info_of(from_pretrained(name))


def _model(name: str, info: Any, task: str, data: Any, weights: str | None) -> Any:
    """A model by name, with a head for the task; or a saved one, whose head must be of that kind already."""
    from sidestream.models import create_model
    from sidestream.models.create import is_saved

    if task in ("clip", "frame") and info.task in TASKS_OF:
        raise InputError(f"{name} answers {info.task}, not classes; give --task {' or '.join(TASKS_OF[info.task])}")
    kind = "keypoints" if task == "keypoints" else "classes"
    wanted = None
    if task in ("clip", "frame", "keypoints"):
        wanted = len(data.points.names) if task == "keypoints" else data.num_classes
    if is_saved(name):
        answers = f"{info.num_classes} {info.task if info.task in ('keypoints', 'masks', 'pictures') else 'classes'}"
        if wanted is not None and answers != f"{wanted} {kind}":
            raise InputError(
                f"{name} answers {answers}, and the data has {wanted} {kind}; give other data or another --task, or "
                "begin from a model by its name"
            )
    return create_model(name, num_classes=wanted, weights=weights, head=kind)  # type: ignore[arg-type]


def _data(options: dict[str, Any], own: Any) -> tuple[Any, Any]:
    """Both parts, as the model wants its clips (``own``: its input spec)."""
    from dataclasses import replace

    from sidestream.data import ClipOptions, open_dataset

    spec = replace(
        own,
        num_frames=_or(options["num_frames"], own.num_frames if own.layout == "BTCHW" else FRAMES_OF_FRAME_MODELS),
        frame_step=_or(options["frame_step"], own.frame_step),
        size_px=own.size_px if options["size"] is None else (options["size"], options["size"]),
        resize_px=own.resize_px if options["size"] is None else None,
    )
    clips = ClipOptions(
        seed=options["seed"],
        random_crop=options["crop"],
        random_flip=options["flip"],
        cache_bytes=options["cache_mib"] * 2**20,
    )
    shared = {"split": options["split"], "root": options["root"], "spec": spec, "options": clips}
    shared["with_points"] = options["task"] == "keypoints"
    train_data = open_dataset(options["data"], part="train", **shared)
    return train_data, open_dataset(options["data"], part="test", **shared)


def _or(given: int | None, default: int) -> int:
    return default if given is None else given
