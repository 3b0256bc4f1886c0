"""Keypoints, predicted: one net run in sequence, in two groups of stages, and fully in parallel.

    SIDESTREAM_DATA=... python recipes/predictive_keypoints.py                      # all that have no record yet
    SIDESTREAM_DATA=... python recipes/predictive_keypoints.py --again --seeds 0 --variants parallel "two groups"
    SIDESTREAM_DATA=... python recipes/predictive_keypoints.py --report             # table and curves from the records

Paper: Carreira, Patraucean et al., "Massively Parallel Video Networks" (ECCV 2018), which predicts keypoints with a
parallel DenseNet, with and without distillation and feedback. Its tables were not at hand, so there is no number to
reach; the question is the paper's: what is lost where no stage waits for another, and what brings some of it back?

Data: JHMDB's joints, official split 1: the clips that have joints (433 for training, 176 test clips), 15 a frame;
successive frames, random crops and flips in training. One net in every variant, AdamW, one update per batch of clips.
The sequential net is trained once per seed ("pretraining" epochs, kept in predictive_keypoints/runs); every variant,
"sequential" too, goes on from it for "epochs" more, and distilled ones have it for a teacher, with the weight
``DISTILL``. There is no validation part: the weight was set beforehand; the epochs were raised once, after a first
run of one seed (6 and 3) whose training loss was still falling.

Setting "small": par_densenet_tiny, 8 stages, 16 frames of 48 x 48 pixels, 12 and 4 epochs: a run takes 1 to 2 minutes
on one core, its pretraining 3. Setting "large", for a GPU: par_densenet, 14 stages, 32 frames of 112 x 112 pixels, 60
and 20 epochs; never run by us.

Scores of the last epoch, both of infinitely fast stages, the first ``latency`` ticks, which have no answer, left out:
"newest" is PCK@0.2 of the answer of tick t on frame t, when it is given; "answered" on frame t - latency, which it is
about. In sequence they are the same thing. Beside them stand the answers of the sequential net given as late as those
of the other wirings (pipelined, not predictive), and the mean pose of the training clips, which needs no net.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from records import HERE, Cell, Record, draw_curves, known, last, main, mean_and_spread
from torch import Tensor

from sidestream.data import ClipDataset, ClipOptions, Loader, open_dataset
from sidestream.models import create_model, load_weights, model_info
from sidestream.models.heatmaps import pck, points_from_maps
from sidestream.report.record import write_beside
from sidestream.train import TrainConfig, TrainResult, fit
from sidestream.train.predictive import LiveNet
from sidestream.train.tasks.keypoints import WINDOW

FOLDER = HERE / "predictive_keypoints"
SETTINGS: dict[str, dict[str, Any]] = {
    "small": {"model": "par_densenet_tiny", "size_px": 48, "num_frames": 16, "pretraining": 12, "epochs": 4},
    "large": {"model": "par_densenet", "size_px": 112, "num_frames": 32, "pretraining": 60, "epochs": 20},
}
DISTILL = 0.1
WIRINGS = {"sequential": "sequential", "two groups": "semi-parallel:2:fresh", "parallel": "parallel"}
EXTRAS: dict[str, dict[str, Any]] = {
    "": {},
    ", distilled": {"distill": DISTILL},
    ", feedback": {"feedback_wire": True},
    ", distilled, feedback": {"distill": DISTILL, "feedback_wire": True},
}
VARIANTS: dict[str, dict[str, Any]] = {
    wiring + extra: {"wiring": WIRINGS[wiring], **options}
    for wiring in WIRINGS
    for extra, options in EXTRAS.items()
    if wiring != "sequential" or "distill" not in options
}
VARIANTS |= {
    "sequential, exact": {"wiring": "sequential", "rule": "exact"},
    "parallel, exact": {"wiring": "parallel", "rule": "exact"},
    "parallel, sideways": {"wiring": "parallel", "rule": "sideways"},
}
"""By depth: without unrolling, each stage forward and back in every tick, batch norms over one tick."""
VARIANTS |= {
    f"{name}, frozen norms": {**VARIANTS[name], "freeze_norms": True}
    for name in ("sequential", "sequential, feedback", "parallel", "parallel, feedback", "parallel, sideways")
}
"""Batch norms with the statistics of the net in sequence, so that no rule sees other ones."""
FROZEN = (", frozen norms", ", feedback, frozen norms", ", sideways, frozen norms")
SCORES = {"test_pck_0.2": "on the newest frame", "answered_pck_0.2": "on the answered frame"}
"""Name in the history -> title. Evaluations are of the newest frame."""


def predictive_keypoints(cell: Cell, out: Path) -> TrainResult:
    """One run. ``cell``: setting, variant (a key of ``VARIANTS``) and seed. Scores of the last weights: last epoch."""
    seed, variant, epochs = cell["seed"], VARIANTS[cell["variant"]], SETTINGS[cell["setting"]]["epochs"]
    train_data, test_data = clips(cell["setting"], seed)
    start = str(pretrained(cell["setting"], seed))
    rule = {"rule": "unrolled", "teacher": start} | variant
    is_by_depth = rule["rule"] != "unrolled"
    if is_by_depth:
        del rule["teacher"]
    config = TrainConfig(**SHARED, **rule, target="newest", epochs=epochs, seed=seed, evaluate_every=epochs)
    torch.manual_seed(seed)
    net = fresh_net(cell["setting"], train_data)
    if is_by_depth:
        load_weights(net, start)
    result = fit(net, train_data, test_data, config=config, out=out)
    net = load_weights(fresh_net(cell["setting"], train_data), out / "last.safetensors").eval()
    *before, end = result.history
    more = {"answered_pck_0.2": pck_of_answered(net, variant["wiring"], test_data)}
    if cell["variant"] == "sequential":
        more |= {f"late_{lag}_pck_0.2": pck_late(net, lag, test_data) for lag in lags(net, test_data)}
    return replace(result, history=(*before, {**end, **more}))


SHARED: dict[str, Any] = {"task": "keypoints", "optimizer": "adamw", "lr": 2e-3, "batch_size": 8, "num_workers": 1}


def pretrained(setting: str, seed: int) -> Path:
    """The last weights of the sequential net, trained once per seed and kept."""
    folder, epochs = FOLDER / "runs" / f"{setting}-sequential-{seed}", SETTINGS[setting]["pretraining"]
    if not (folder / "done").is_file():
        train_data, test_data = clips(setting, seed)
        torch.manual_seed(seed)
        config = TrainConfig(**SHARED, epochs=epochs, seed=seed, evaluate_every=epochs)
        is_begun = (folder / "config.json").is_file()
        fit(fresh_net(setting, train_data), train_data, test_data, config=config, out=folder, resume=is_begun)
        (folder / "done").touch()
    return folder / "last.safetensors"


def fresh_net(setting: str, data: ClipDataset) -> Any:
    assert data.points is not None
    return create_model(SETTINGS[setting]["model"], num_classes=len(data.points.names), head="keypoints")


def pck_of_answered(net: Any, wiring: str, data: ClipDataset) -> float:
    """Of the answers that are given while a clip lasts, each against the frame that it is about."""
    return _pck_of(LiveNet(net, torch.zeros(1, 3, *data.spec.size_px), wiring).answers, data, lag=0)


def pck_late(net: Any, lag: int, data: ClipDataset) -> float:
    """Of the net's answers in sequence, each against the frame ``lag`` ticks after the one that it is about."""
    return _pck_of(net.answers, data, lag=lag)


def lags(net: Any, data: ClipDataset) -> list[int]:
    """Ticks by which the answers of the other wirings are late."""
    frame_BCHW = torch.zeros(1, 3, *data.spec.size_px)
    return [LiveNet(net, frame_BCHW, wiring).latency for wiring in WIRINGS.values() if wiring != "sequential"]


@torch.no_grad()
def _pck_of(answers: Callable[[Tensor], Tensor], data: ClipDataset, *, lag: int) -> float:
    num_right = num_points = 0
    for batch in Loader(data, batch_size=SHARED["batch_size"]).batches(0):
        maps = answers(batch.clip_BTCHW)
        assert batch.points_BTP3 is not None
        num_frames = min(maps.shape[1], batch.points_BTP3.shape[1] - lag)
        truth_NP3 = batch.points_BTP3[:, lag : lag + num_frames].flatten(0, 1)
        cell_px = data.spec.size_px[1] / maps.shape[-1]
        found_NP2, _ = points_from_maps(maps[:, :num_frames].flatten(0, 1), cell_px, window=WINDOW)
        counted = pck(found_NP2, truth_NP3[..., :2], alpha=0.2, labelled_NP=truth_NP3[..., 2] > 0)
        num_right, num_points = num_right + counted.num_right, num_points + counted.num_points
    return num_right / max(1, num_points)


@cache
def clips(setting: str, seed: int) -> tuple[ClipDataset, ClipDataset]:
    """Both parts; decoded frames are kept from run to run."""
    options, size_px = SETTINGS[setting], SETTINGS[setting]["size_px"]
    spec = model_info(options["model"]).input_spec.replace(
        num_frames=options["num_frames"], frame_step=1, size_px=(size_px, size_px), resize_px=None
    )
    drawn = ClipOptions(seed=seed, random_crop=True, random_flip=True)
    train, test = (
        open_dataset("jhmdb", part=part, split=1, spec=spec, options=drawn, with_points=True)
        for part in ("train", "test")
    )
    return train, test


def report() -> str:
    """README's table, depth.png (accuracy against depth-parallelism) and curves.png (the loss of training)."""
    records = [r for r in known(FOLDER / "results.jsonl") if r["cell"]["setting"] == "small"]
    rows = {v: [r for r in records if r["cell"]["variant"] == v] for v in VARIANTS}
    panels = {wiring: {v: rows[v] for v in VARIANTS if v.startswith(wiring)} for wiring in WIRINGS}
    draw_curves(panels, "train_loss", FOLDER / "curves.png", label="loss on the training clips")
    draw_depth(rows)
    lines = ["| PCK@0.2, % | " + " | ".join(SCORES.values()) + " | seconds a run |", "| --- | ---: | ---: | ---: |"]
    for variant, found in rows.items():
        cells = [mean_and_spread([last(r, name) for r in found], 100) for name in SCORES]
        seconds = [r["seconds"] for r in found]
        cells.append(f"{min(seconds):.0f}-{max(seconds):.0f}" if seconds else "")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    late = [name for name in (rows["sequential"] or [{"history": [{}]}])[0]["history"][-1] if name.startswith("late_")]
    for name in late:
        ticks = name.split("_")[1]
        scores = mean_and_spread([last(r, name) for r in rows["sequential"]], 100)
        lines.append(f"| sequential, its answers {ticks} tick{'s' if ticks != '1' else ''} late | {scores} | | |")
    poses = mean_and_spread([last(r, "test_mean_pose_pck_0.2") for r in rows["sequential"]], 100)
    lines.append(f"| mean pose | {poses} | | |")
    return "\n".join(lines)


def draw_depth(rows: Mapping[str, Sequence[Record]]) -> None:
    """PCK on the newest frame against the number of stages that work at once; a bar of least to greatest per point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9.5, 4.2))
    for number, extra in enumerate([*EXTRAS, *FROZEN]):
        line = []
        for place, wiring in enumerate(WIRINGS):
            # In sequence nothing is distilled: those lines begin at the net that was trained without.
            found = rows.get(wiring + extra) or (rows.get(wiring + extra.replace(", distilled", "")) or [])
            scores = [100 * last(r, "test_pck_0.2") for r in found]
            if scores:
                line.append((place + 0.04 * (number - 3), statistics.mean(scores), min(scores), max(scores)))
        if line:
            x, mean, low, high = map(list, zip(*line, strict=True))
            around = [[m - lo for m, lo in zip(mean, low)], [hi - m for m, hi in zip(mean, high)]]
            style = "--" if extra in FROZEN else "-"
            axis.errorbar(x, mean, around, fmt=style, marker="o", capsize=3, label=extra.removeprefix(", ") or "plain")
    poses = [100 * last(r, "test_mean_pose_pck_0.2") for r in rows["sequential"]]
    if poses:
        axis.axhline(statistics.mean(poses), color="grey", linestyle=":", label="mean pose")
    axis.set(xticks=range(len(WIRINGS)), xticklabels=["1\nsequential", "2\ntwo groups", "8\nparallel"], ylim=(20, None))
    axis.set(xlabel="stages that work at once", ylabel="PCK@0.2 on the newest frame, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    with write_beside(FOLDER / "depth.png") as part:
        figure.savefig(part, dpi=110, format="png")
    plt.close(figure)


if __name__ == "__main__":
    axes: dict[str, Sequence[Any]] = {"seed": (0, 1, 2), "setting": list(SETTINGS), "variant": list(VARIANTS)}
    main(__doc__, predictive_keypoints, report, FOLDER, axes, not_by_default=["large"])
