"""Actions from scratch: backprop, 1F1B, Sideways, Skip-Sideways and uni-directional TSM on one net.

    SIDESTREAM_DATA=... python recipes/sideways_actions.py                      # all runs; what is done is not repeated
    SIDESTREAM_DATA=... python recipes/sideways_actions.py --models simple_cnn --seeds 0 --variants sideways
    SIDESTREAM_DATA=... python recipes/sideways_actions.py --report            # table and curves from the records

Papers: Malinowski et al., "Sideways: Depth-Parallel Training of Video Models" (CVPR 2020) and "Gradient
Forward-Propagation for Large-Scale Temporal Video Modelling" (CVPR 2021). Their tables were not at hand, so there is no
number to reach; the question is theirs: how far do pseudo-gradients get, compared with backprop's?

Data: JHMDB, official split 1: 660 training clips, 268 test clips, 21 classes (the largest has 6.0 % of the test clips).
Setting "small" (one run: 2 to 4 minutes on one core): VGG-8 of a quarter of the widths or the small CNN, frames of
32 x 32 pixels from random crops and flips, clips of 24 successive frames, batches of 16, AdamW, 10 epochs, one update
per batch, every frame with the label of its clip. Setting "large", for a GPU: full VGG-8, 112 x 112 pixels, 64 frames
(short clips hold their last frame), batches of 32, 60 epochs; never run by us.
The score is the test accuracy of the last epoch, a clip's logits being the mean of its frames'.
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

FOLDER = HERE / "sideways_actions"
MODELS = {"vgg8": "projection", "simple_cnn": "add"}
"""Model -> how its skips are joined: VGG-8's shapes change from layer to layer."""
VARIANTS: dict[str, dict[str, Any]] = {
    "backprop": {"rule": "backprop"},
    "exact (1F1B)": {"rule": "exact"},
    "sideways": {"rule": "sideways"},
    "skips, backprop": {"rule": "backprop", "skips": True},
    "skip-sideways": {"rule": "sideways", "skips": True},
    "uni-directional TSM, backprop": {"rule": "backprop", "shift": True},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "small": {"width": "_quarter", "size_px": 32, "num_frames": 24, "batch_size": 16, "epochs": 10, "lr": 1e-3},
    "large": {"width": "", "size_px": 112, "num_frames": 64, "batch_size": 32, "epochs": 60, "lr": 1e-3},
}


def sideways_actions(cell: Cell, out: Path) -> TrainResult:
    """One run. ``cell``: setting, model (a key of ``MODELS``), variant (of ``VARIANTS``) and seed."""
    setting, variant, seed = SETTINGS[cell["setting"]], VARIANTS[cell["variant"]], cell["seed"]
    width = setting["width"] if cell["model"] == "vgg8" else ""
    name = cell["model"] + width + ("_tsm_online" if variant.get("shift") else "")
    train_data, test_data = clips(seed, setting["size_px"], setting["num_frames"])
    torch.manual_seed(seed)
    model = create_model(name, num_classes=train_data.num_classes)
    config = TrainConfig(
        rule=variant["rule"],
        skips=MODELS[cell["model"]] if variant.get("skips") else "none",
        task="frame",
        optimizer="adamw",
        lr=setting["lr"],
        batch_size=setting["batch_size"],
        epochs=setting["epochs"],
        seed=seed,
        num_workers=1,
    )
    return fit(model, train_data, test_data, config=config, out=out)


@cache
def clips(seed: int, size_px: int, num_frames: int) -> tuple[ClipDataset, ClipDataset]:
    """Both parts; decoded frames are kept from run to run."""
    spec = model_info("vgg8").input_spec.replace(
        num_frames=num_frames, frame_step=1, size_px=(size_px, size_px), resize_px=None
    )
    options = ClipOptions(seed=seed, random_crop=True, random_flip=True)
    train, test = (open_dataset("jhmdb", part=part, split=1, spec=spec, options=options) for part in ("train", "test"))
    return train, test


def report() -> str:
    """README's table, and curves.png."""
    records = [r for r in known(FOLDER / "results.jsonl") if r["cell"]["setting"] == "small"]
    panels = {
        model: {v: [r for r in records if r["cell"]["model"] == model and r["cell"]["variant"] == v] for v in VARIANTS}
        for model in MODELS
    }
    draw_curves(panels, "test_accuracy", FOLDER / "curves.png", label="test accuracy, %", scale=100)
    lines = [
        "| | " + " | ".join(f"{m}: test, %" for m in MODELS) + " | " + " | ".join(f"{m}: train, %" for m in MODELS)
    ]
    lines[0] += " | seconds a run |"
    lines.append("| --- |" + " ---: |" * (2 * len(MODELS) + 1))
    for variant in VARIANTS:
        found = [panels[model][variant] for model in MODELS]
        cells = [mean_and_spread([last(r, "test_accuracy") for r in some], 100) for some in found]
        cells += [mean_and_spread([last(r, "train_accuracy") for r in some], 100) for some in found]
        seconds = [r["seconds"] for some in found for r in some]
        cells.append(f"{min(seconds):.0f}-{max(seconds):.0f}" if seconds else "")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    axes: dict[str, Sequence[Any]] = {
        "seed": (0, 1, 2),
        "setting": list(SETTINGS),
        "model": list(MODELS),
        "variant": list(VARIANTS),
    }
    main(__doc__, sideways_actions, report, FOLDER, axes, not_by_default=["large"])
