"""How slow must the video be? Backprop and Sideways at falling frame rates.

    SIDESTREAM_DATA=... python recipes/sideways_frame_rate.py                  # all runs; what is done is not repeated
    SIDESTREAM_DATA=... python recipes/sideways_frame_rate.py --report        # table and picture from the records

    python recipes/sideways_frame_rate.py --settings large                    # for a GPU; never run by us

Paper: Malinowski et al., "Sideways: Depth-Parallel Training of Video Models" (CVPR 2020), whose premise is that frames
change slowly: with 8 stages the first one multiplies gradients with activations that are 14 frames newer.

Data: Weizmann, 90 clips of 10 actions by 9 actors at 25 frames per second. Seed s trains on six actors and tests on
the three of group s, so three seeds test every clip once. Clips of 24 frames, every one, second, fourth or eighth frame
of the video (25, 12.5, 6.25, 3.125 frames per second); clips that are too short begin again, which adds a jump for all
rules alike. VGG-8 of a quarter of the widths with batch norms, 32 x 32 pixels, random crops and flips, batches of 6,
AdamW, 20 epochs, one update per batch. Backprop normalises over all frames of a batch, Sideways frame by frame. One
run: about a minute on one core. Setting "large": full VGG-8 at 112 x 112 pixels, 60 epochs. The score is the test
accuracy of the last epoch.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from records import HERE, Cell, Record, known, last, main, mean_and_spread

from sidestream.data import ClipDataset, ClipOptions, open_dataset
from sidestream.models import create_model, model_info
from sidestream.report.record import write_beside
from sidestream.train import TrainConfig, TrainResult, fit

FOLDER = HERE / "sideways_frame_rate"
FRAME_RATE = 25.0
FRAME_STEPS = (1, 2, 4, 8)
GROUPS = ("daria,denis,eli", "ido,ira,lena", "lyova,moshe,shahar")
SETTINGS: dict[str, dict[str, Any]] = {
    "small": {"model": "vgg8_quarter_bn", "size_px": 32, "epochs": 20},
    "large": {"model": "vgg8_bn", "size_px": 112, "epochs": 60},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "backprop": {"rule": "backprop"},
    "sideways": {"rule": "sideways"},
}
SHOWN = {
    "test_accuracy": ("test accuracy, %", 100.0, 1),
    "train_accuracy": ("training accuracy, %", 100.0, 1),
    "train_loss": ("training loss", 1.0, 2),
}


def sideways_frame_rate(cell: Cell, out: Path) -> TrainResult:
    """One run. ``cell``: setting, variant (a key of ``VARIANTS``), frame_step and seed (0 to 2)."""
    setting = SETTINGS[cell["setting"]]
    train_data, test_data = clips(cell["seed"], cell["frame_step"], setting["size_px"])
    torch.manual_seed(cell["seed"])
    model = create_model(setting["model"], num_classes=train_data.num_classes)
    config = TrainConfig(
        **VARIANTS[cell["variant"]],
        task="frame",
        optimizer="adamw",
        lr=2e-3,
        batch_size=6,
        epochs=setting["epochs"],
        evaluate_every=5,
        seed=cell["seed"],
        num_workers=1,
    )
    return fit(model, train_data, test_data, config=config, out=out)


@cache
def clips(seed: int, frame_step: int, size_px: int) -> tuple[ClipDataset, ClipDataset]:
    spec = model_info("vgg8").input_spec.replace(
        num_frames=24, frame_step=frame_step, size_px=(size_px, size_px), resize_px=None
    )
    options = ClipOptions(seed=seed, random_crop=True, random_flip=True, short="loop")
    shared: dict[str, Any] = {"split": GROUPS[seed], "spec": spec, "options": options}
    return open_dataset("weizmann", part="train", **shared), open_dataset("weizmann", part="test", **shared)


def report() -> str:
    """README's table, and frame_rate.png."""
    records = [r for r in known(FOLDER / "results.jsonl") if r["cell"]["setting"] == "small"]
    found = {
        (v, s): [r for r in records if r["cell"]["variant"] == v and r["cell"]["frame_step"] == s]
        for v in VARIANTS
        for s in FRAME_STEPS
    }
    draw(found, FOLDER / "frame_rate.png")
    lines: list[str] = []
    for name, (title, scale, digits) in SHOWN.items():
        lines += ["", f"| {title} | " + " | ".join(f"{FRAME_RATE / s:g} fps" for s in FRAME_STEPS) + " |"]
        lines.append("| --- |" + " ---: |" * len(FRAME_STEPS))
        for v in VARIANTS:
            cells = [mean_and_spread([last(r, name) for r in found[v, s]], scale, digits) for s in FRAME_STEPS]
            lines.append(f"| {v} | " + " | ".join(cells) + " |")
    return "\n".join(lines[1:])


def draw(found: dict[tuple[str, int], list[Record]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SHOWN), figsize=(13, 3.8))
    for axis, (name, (title, scale, _)) in zip(axes, SHOWN.items(), strict=True):
        for number, variant in enumerate(VARIANTS):
            points = [(s, [scale * last(r, name) for r in found[variant, s]]) for s in FRAME_STEPS if found[variant, s]]
            rates = [FRAME_RATE / s for s, _ in points]
            axis.plot(rates, [statistics.mean(v) for _, v in points], marker="o", label=variant, color=f"C{number}")
            for rate, (_, values) in zip(rates, points, strict=True):
                axis.plot([rate * (0.97 + 0.03 * number)] * len(values), values, ".", color=f"C{number}", alpha=0.5)
        axis.set_xscale("log", base=2)
        axis.set_xticks([FRAME_RATE / s for s in FRAME_STEPS], [f"{FRAME_RATE / s:g}" for s in FRAME_STEPS])
        axis.set(xlabel="frames per second", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    with write_beside(path) as part:
        figure.savefig(part, dpi=110, format="png")
    plt.close(figure)


if __name__ == "__main__":
    axes: dict[str, Sequence[Any]] = {
        "seed": (0, 1, 2),
        "setting": list(SETTINGS),
        "frame_step": FRAME_STEPS,
        "variant": list(VARIANTS),
    }
    main(__doc__, sideways_frame_rate, report, FOLDER, axes, not_by_default=["large"])
