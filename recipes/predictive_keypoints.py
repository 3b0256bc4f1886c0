"""Keypoints, predicted: one net run in sequence, in two groups of stages, and fully in parallel.

    SIDESTREAM_DATA=... python recipes/predictive_keypoints.py                      # all; what is done is not repeated
    SIDESTREAM_DATA=... python recipes/predictive_keypoints.py --variants parallel "parallel, distilled" --seeds 0
    SIDESTREAM_DATA=... python recipes/predictive_keypoints.py --report             # table and curves from the records

Paper: Carreira, Patraucean et al., "Massively Parallel Video Networks" (ECCV 2018), which predicts keypoints with a
parallel DenseNet, with and without distillation and feedback. Its tables were not at hand, so there is no number to
reach; the question is the paper's: what is lost where no stage waits for another, and what brings some of it back?

Data: JHMDB's joints, official split 1: the clips that have joints, 15 a frame; 16 successive frames of 48 x 48 pixels,
random crops and flips in training. par_densenet_tiny, 8 stages, in every variant; batches of 8, AdamW, one update per
batch. The sequential net is trained once per seed (``PRETRAINING`` epochs, kept in predictive_keypoints/runs);
every variant, "sequential" too, goes on from it for ``EPOCHS`` more, and distilled ones have it for a teacher, with the
weight ``DISTILL``. There is no validation part: epochs and weight were set beforehand, not by a score.

Scores of the last epoch, both of infinitely fast stages, the first ``latency`` ticks, which have no answer, left out:
"newest" is PCK@0.2 of the answer of tick t on frame t, when it is given; "answered" on frame t - latency, which it is
about. In sequence they are the same thing. Beside them stands the mean pose of the training clips, which needs no net.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from records import HERE, Cell, draw_curves, known, last, main, mean_and_spread

from sidestream.data import ClipDataset, ClipOptions, Loader, open_dataset
from sidestream.models import create_model, load_weights, model_info
from sidestream.models.heatmaps import pck, points_from_maps
from sidestream.train import TrainConfig, TrainResult, fit
from sidestream.train.predictive import LiveNet
from sidestream.train.tasks.keypoints import WINDOW

FOLDER = HERE / "predictive_keypoints"
MODEL, SIZE_PX, NUM_FRAMES = "par_densenet_tiny", 48, 16
PRETRAINING, EPOCHS, DISTILL = 6, 3, 0.1
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
SCORES = {"test_pck_0.2": "on the newest frame", "answered_pck_0.2": "on the answered frame"}
"""Name in the history -> title. Evaluations of the rule "unrolled" are of the newest frame."""


def predictive_keypoints(cell: Cell, out: Path) -> TrainResult:
    """One run. ``cell``: variant (a key of ``VARIANTS``) and seed. Scores of the last weights are in its last epoch."""
    seed, variant = cell["seed"], VARIANTS[cell["variant"]]
    train_data, test_data = clips(seed)
    config = TrainConfig(
        **SHARED,
        **variant,
        rule="unrolled",
        target="newest",
        epochs=EPOCHS,
        seed=seed,
        teacher=str(pretrained(seed)),
        evaluate_every=EPOCHS,
    )
    torch.manual_seed(seed)
    result = fit(fresh_net(train_data), train_data, test_data, config=config, out=out)
    net = load_weights(fresh_net(train_data), out / "last.safetensors").eval()
    *before, end = result.history
    answered = pck_of_answered(net, variant["wiring"], test_data)
    return replace(result, history=(*before, {**end, "answered_pck_0.2": answered}))


SHARED: dict[str, Any] = {"task": "keypoints", "optimizer": "adamw", "lr": 2e-3, "batch_size": 8, "num_workers": 1}


def pretrained(seed: int) -> Path:
    """The last weights of the sequential net, trained once per seed and kept."""
    folder = FOLDER / "runs" / f"sequential-{seed}"
    if not (folder / "done").is_file():
        train_data, test_data = clips(seed)
        torch.manual_seed(seed)
        config = TrainConfig(**SHARED, epochs=PRETRAINING, seed=seed, evaluate_every=PRETRAINING)
        is_begun = (folder / "config.json").is_file()
        fit(fresh_net(train_data), train_data, test_data, config=config, out=folder, resume=is_begun)
        (folder / "done").touch()
    return folder / "last.safetensors"


def fresh_net(data: ClipDataset) -> Any:
    assert data.points is not None
    return create_model(MODEL, num_classes=len(data.points.names), head="keypoints")


@torch.no_grad()
def pck_of_answered(net: Any, wiring: str, data: ClipDataset) -> float:
    """Of the answers that are given while a clip lasts, each against the frame that it is about."""
    live = LiveNet(net, torch.zeros(1, 3, SIZE_PX, SIZE_PX), wiring)
    num_right = num_points = 0
    for batch in Loader(data, batch_size=SHARED["batch_size"]).batches(0):
        maps = live.answers(batch.clip_BTCHW)
        assert batch.points_BTP3 is not None
        truth_NP3 = batch.points_BTP3[:, : maps.shape[1]].flatten(0, 1)
        found_NP2, _ = points_from_maps(maps.flatten(0, 1), SIZE_PX / maps.shape[-1], window=WINDOW)
        counted = pck(found_NP2, truth_NP3[..., :2], alpha=0.2, labelled_NP=truth_NP3[..., 2] > 0)
        num_right, num_points = num_right + counted.num_right, num_points + counted.num_points
    return num_right / max(1, num_points)


@cache
def clips(seed: int) -> tuple[ClipDataset, ClipDataset]:
    """Both parts; decoded frames are kept from run to run."""
    spec = model_info(MODEL).input_spec.replace(
        num_frames=NUM_FRAMES, frame_step=1, size_px=(SIZE_PX, SIZE_PX), resize_px=None
    )
    options = ClipOptions(seed=seed, random_crop=True, random_flip=True)
    train, test = (
        open_dataset("jhmdb", part=part, split=1, spec=spec, options=options, with_points=True)
        for part in ("train", "test")
    )
    return train, test


def report() -> str:
    """README's table, and curves.png (the loss of training)."""
    records = known(FOLDER / "results.jsonl")
    rows = {v: [r for r in records if r["cell"]["variant"] == v] for v in VARIANTS}
    panels = {wiring: {v: rows[v] for v in VARIANTS if v.startswith(wiring)} for wiring in WIRINGS}
    draw_curves(panels, "train_loss", FOLDER / "curves.png", label="loss on the training clips")
    lines = ["| PCK@0.2, % | " + " | ".join(SCORES.values()) + " | seconds a run |", "| --- | ---: | ---: | ---: |"]
    for variant, found in rows.items():
        cells = [mean_and_spread([last(r, name) for r in found], 100) for name in SCORES]
        seconds = [r["seconds"] for r in found]
        cells.append(f"{min(seconds):.0f}-{max(seconds):.0f}" if seconds else "")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    poses = mean_and_spread([last(r, "test_mean_pose_pck_0.2") for r in rows["sequential"]], 100)
    lines.append(f"| mean pose | {poses} | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    axes: dict[str, Sequence[Any]] = {"seed": (0, 1, 2), "variant": list(VARIANTS)}
    main(__doc__, predictive_keypoints, report, FOLDER, axes)
