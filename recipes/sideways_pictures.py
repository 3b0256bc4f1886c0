"""Drawing frames and frames to come: backprop, Sideways and Skip-Sideways on a convolutional auto-encoder.

    SIDESTREAM_DATA=... python recipes/sideways_pictures.py                    # all runs; what is done is not repeated
    SIDESTREAM_DATA=... python recipes/sideways_pictures.py --report          # table and curves from the records

    python recipes/sideways_pictures.py --settings large                      # for a GPU; never run by us

Papers: Malinowski et al., "Sideways: Depth-Parallel Training of Video Models" (CVPR 2020) trains auto-encoders;
"Gradient Forward-Propagation for Large-Scale Temporal Video Modelling" (CVPR 2021) says that Skip-Sideways draws better
future frames than Sideways, since it sees several frames. Their numbers were not at hand.

Data: Weizmann, 90 clips of 10 actions by 9 actors at 25 frames per second. Seed s trains on six actors and tests on the
three of group s, so three seeds test every clip once. conv_autoencoder_small (6 stages, 1/8 in the middle), 64 x 64
pixels, clips of 24 successive frames, batches of 6, AdamW, 10 epochs, one update per batch, mean squared error.
"future" draws the frame 4 frames (0.16 s) after the newest one seen. One run: about a minute on one core.
Setting "large": conv_autoencoder (8 stages, 1/16), 112 x 112 pixels, 60 epochs.
Score: PSNR of the last epoch on the test clips, in dB; beside it that of the newest frame seen, repeated, and of the
mean training frame, which need no net.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from records import HERE, Cell, draw_curves, known, last, main, mean_and_spread

from sidestream.data import ClipDataset, ClipOptions, open_dataset
from sidestream.models import create_model, model_info
from sidestream.train import TrainConfig, TrainResult, fit

FOLDER = HERE / "sideways_pictures"
SETTINGS: dict[str, dict[str, Any]] = {
    "small": {"model": "conv_autoencoder_small", "epochs": 10},
    "large": {"model": "conv_autoencoder", "epochs": 60},
}
GROUPS = ("daria,denis,eli", "ido,ira,lena", "lyova,moshe,shahar")
TASKS: dict[str, dict[str, Any]] = {"autoencode": {}, "future": {"horizon": 4}}
VARIANTS: dict[str, dict[str, Any]] = {
    "backprop": {"rule": "backprop"},
    "sideways": {"rule": "sideways"},
    "skips, backprop": {"rule": "backprop", "skips": "projection"},
    "skip-sideways": {"rule": "sideways", "skips": "projection"},
}


def sideways_pictures(cell: Cell, out: Path) -> TrainResult:
    """One run. ``cell``: setting, task (a key of ``TASKS``), variant (of ``VARIANTS``) and seed (0 to 2)."""
    setting = SETTINGS[cell["setting"]]
    train_data, test_data = clips(cell["seed"], setting["model"])
    torch.manual_seed(cell["seed"])
    config = TrainConfig(
        **VARIANTS[cell["variant"]],
        **TASKS[cell["task"]],
        task=cell["task"],
        optimizer="adamw",
        lr=2e-3,
        batch_size=6,
        epochs=setting["epochs"],
        evaluate_every=2,
        seed=cell["seed"],
        num_workers=1,
    )
    return fit(create_model(setting["model"]), train_data, test_data, config=config, out=out)


@cache
def clips(seed: int, model: str) -> tuple[ClipDataset, ClipDataset]:
    spec = model_info(model).input_spec.replace(num_frames=24, frame_step=1)
    shared: dict[str, Any] = {"split": GROUPS[seed], "spec": spec, "options": ClipOptions(seed=seed, random_flip=True)}
    return open_dataset("weizmann", part="train", **shared), open_dataset("weizmann", part="test", **shared)


def report() -> str:
    """README's table, and curves.png."""
    records = [r for r in known(FOLDER / "results.jsonl") if r["cell"]["setting"] == "small"]
    panels = {
        task: {v: [r for r in records if r["cell"]["task"] == task and r["cell"]["variant"] == v] for v in VARIANTS}
        for task in TASKS
    }
    draw_curves(panels, "test_psnr", FOLDER / "curves.png", label="test PSNR, dB")
    lines = ["| test PSNR, dB | " + " | ".join(TASKS) + " |", "| --- |" + " ---: |" * len(TASKS)]
    for variant in VARIANTS:
        cells = [mean_and_spread([last(r, "test_psnr") for r in panels[task][variant]], digits=2) for task in TASKS]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    for name, title in (("test_repeat_psnr", "newest frame seen, repeated"), ("test_mean_frame_psnr", "mean frame")):
        cells = []
        for task in TASKS:
            plain = panels[task]["backprop"]
            cells.append(mean_and_spread([last(r, name) for r in plain if name in r["history"][-1]], digits=2))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    axes: dict[str, Sequence[Any]] = {
        "seed": (0, 1, 2),
        "setting": list(SETTINGS),
        "task": list(TASKS),
        "variant": list(VARIANTS),
    }
    main(__doc__, sideways_pictures, report, FOLDER, axes, not_by_default=["large"])
