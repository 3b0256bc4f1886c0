"""Accuracy of the families on JHMDB split 1: short training from scratch, and linear probes where there are weights.

    SIDESTREAM_DATA=... python benchmarks/families/accuracy.py --minutes 45      # --plan-only first

From scratch: every model the same number of epochs, AdamW, no augmentation but flips, clips of 8 frames (every second
one) of 64 x 64 pixels; I3D reads 9 frames, the fewest that it takes. The number of epochs is what fits into --minutes
for all models together, from one timed batch of each. This is a comparison under a tight budget, far from what any of
these models reaches. Probes: logistic regression on frozen features; a GRU on frozen features per frame.
After training, batch norms take their statistics anew from the training clips, for all models alike.
One JSON line per result, appended as it is finished; what is in the file is not trained again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.data import ClipOptions, Loader, open_dataset
from sidestream.evals.compare_talk import DEFAULT_MODELS
from sidestream.evals.probe import extract_features, linear_probe
from sidestream.models import create_model, input_spec_of
from sidestream.report.measure import machine, num_cores
from sidestream.report.record import json_lines, read_json_lines
from sidestream.train import TrainConfig, evaluate, fit
from sidestream.train.answering import Answering

HERE = Path(__file__).parent
NUM_CLASSES, NUM_TRAIN, NUM_TEST = 21, 660, 268
TEST_SHARE = 0.35
"""What a clip costs without gradients, of what it costs with them (forward only; about a third)."""
FRAME_STEP, MAX_EPOCHS, GRU_EPOCHS, PROBE_PX = 2, 30, 30, 112
PROBES = ("frame_efficientnet_lite0", "i3d", "frame_efficientnet_lite0")
PROBE_METHODS = ("linear probe, ImageNet weights", "linear probe, Kinetics-400 weights", "GRU, ImageNet weights")
Record = dict[str, Any]


def spec_for(model: nn.Module, options: argparse.Namespace, *, size_px: int | None = None) -> Any:
    """What the model is fed: its own normalisation, the benchmark's frames and size."""
    spec = input_spec_of(model)
    assert spec is not None  # create_model knows every model that it makes
    num_frames, size_px = max(options.num_frames, spec.min_frames or 1), size_px or options.size
    step = getattr(options, "frame_step", FRAME_STEP)
    return spec.replace(num_frames=num_frames, frame_step=step, size_px=(size_px, size_px), resize_px=None)


def data(model: nn.Module, part: str, options: argparse.Namespace, *, size_px: int | None = None) -> Any:
    spec = spec_for(model, options, size_px=size_px)
    flips = ClipOptions(seed=options.seed, random_flip=part == "train" and size_px is None)
    return open_dataset("jhmdb", part=part, split=1, spec=spec, options=flips)


def seconds_per_epoch(name: str, precision: str, options: argparse.Namespace) -> float:
    """From one timed training step, after one to warm up; decoding is not in it."""
    torch.manual_seed(options.seed)
    model = create_model(name, num_classes=NUM_CLASSES).train()
    size = options.size
    clip_BTCHW = torch.rand(options.timed_batch, spec_for(model, options).num_frames, 3, size, size)
    labels_B = torch.zeros(len(clip_BTCHW), dtype=torch.long)
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    for _ in range(2):
        began = time.perf_counter()
        with autocast:
            loss = nn.functional.cross_entropy(model(clip_BTCHW).float(), labels_B)
        loss.backward()
    return (time.perf_counter() - began) / len(clip_BTCHW) * NUM_TRAIN


def plan(options: argparse.Namespace) -> tuple[str, int]:
    """(precision, epochs) that fit into the time, printed; measured once, then given by --precision and --epochs."""
    found: dict[str, dict[str, float]] = {}
    for precision in ("no", "bf16") if options.precision == "auto" else (options.precision,):
        found[precision] = {}
        for name in options.models:
            found[precision][name] = seconds_per_epoch(name, precision, options)
            print(f"{name}, precision {precision}: {found[precision][name]:.0f} s per epoch", flush=True)
    precision = min(found, key=lambda p: sum(found[p].values()))
    total = sum(found[precision].values())
    tests = total * TEST_SHARE * NUM_TEST / NUM_TRAIN
    epochs = options.epochs or max(1, min(MAX_EPOCHS, int((options.minutes * 60 - tests) / total)))
    print(f"plan: precision {precision}, {epochs} epochs of every model, {(epochs * total + tests) / 60:.0f} minutes")
    return precision, epochs


def scratch(name: str, precision: str, epochs: int, options: argparse.Namespace) -> Record:
    torch.manual_seed(options.seed)
    model = create_model(name, num_classes=NUM_CLASSES)
    config = TrainConfig(
        epochs=epochs,
        batch_size=options.batch_size,
        optimizer="adamw",
        lr=3e-4,
        weight_decay=0.05,
        precision=precision,
        device="cpu",
        seed=options.seed,
        evaluate_every=epochs,
        warmup_epochs=min(1.0, epochs / 4),
        num_workers=1,
    )
    folder = options.runs / f"{name}-{epochs}-{options.seed}"
    train, test = data(model, "train", options), data(model, "test", options)
    found = fit(model, train, test, config=config, out=folder, resume=folder.exists())
    settle_norms(model, Loader(train.with_part("test"), batch_size=options.batch_size, shuffle=False))
    scored = evaluate(Answering(model, "clip"), Loader(test, batch_size=options.batch_size, shuffle=False).batches(0))
    budget = f"{epochs} epochs, AdamW, batch {options.batch_size}, {options.size} px, precision {precision}"
    return {
        "top1": scored.accuracy,
        "top1_before_settling": found.test_accuracy,
        "budget": budget,
        "num_frames": spec_for(model, options).num_frames,
        "seconds": round(found.seconds, 1),
    }


@torch.no_grad()
def settle_norms(model: nn.Module, loader: Loader) -> None:
    """Batch norms get the statistics of one more pass over the training clips: after so few updates the running
    averages of the models that average slowly (I3D) still hold much of where they started."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for batch in loader.batches(0) if norms else ():
        model(batch.clip_BTCHW)
    model.eval()


def probe(name: str, method: str, options: argparse.Namespace) -> Record:
    """On frozen features of real weights, frames of 112 px: 32 in a row (I3D), or 16, every second one (ImageNet)."""
    began = time.perf_counter()
    is_i3d = name == "i3d"
    if is_i3d:
        folder = Path(os.environ["SIDESTREAM_DATA"]) / "i3d_kinetics400"
        model, frames = create_model(name, weights=folder / "i3d_rgb_kinetics400_piergiaj_keys.pt"), (32, 1)
    else:
        model, frames = create_model(name, weights="default"), (16, 2)
    own = argparse.Namespace(**{**vars(options), "num_frames": frames[0], "frame_step": frames[1]})
    pool = "frame" if method.startswith("GRU") else "clip"
    sets = [extract_features(model, data(model, p, own, size_px=PROBE_PX), pool=pool) for p in ("train", "test")]
    (train, train_labels, _), (test, test_labels, _) = sets
    if pool == "frame":
        top1, budget = gru_on_top(train, train_labels, test, test_labels, options.seed), f"{GRU_EPOCHS} epochs, AdamW"
    else:
        top1, budget = linear_probe(train, train_labels, test, test_labels, c=0.01).accuracy, "L-BFGS, C = 0.01"
    budget += f", frozen features, {frames[0]} frames of {PROBE_PX} px"
    seconds = round(time.perf_counter() - began, 1)
    return {"top1": top1, "budget": budget, "num_frames": frames[0], "seconds": seconds}


class GruHead(nn.Module):
    """A GRU over the features of the frames; its answers averaged over time."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.drop, self.gru = nn.Dropout(0.5), nn.GRU(num_features, 256, batch_first=True)
        self.head = nn.Linear(256, NUM_CLASSES)

    def forward(self, features_BTD: Tensor) -> Tensor:
        return self.head(self.drop(self.gru(self.drop(features_BTD))[0].mean(1)))


def gru_on_top(train_NTD: Tensor, labels_N: Tensor, test_NTD: Tensor, test_labels_N: Tensor, seed: int) -> float:
    """Top-1 of a GRU over the features of the frames."""
    mean, std = train_NTD.mean((0, 1)), train_NTD.std((0, 1)).clamp_min(1e-6)
    train_NTD, test_NTD = (train_NTD - mean) / std, (test_NTD - mean) / std
    torch.manual_seed(seed)
    net = GruHead(train_NTD.shape[-1])
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.1)
    chance = torch.Generator().manual_seed(seed)
    for _ in range(GRU_EPOCHS):
        for rows in torch.randperm(len(train_NTD), generator=chance).split(32):
            loss = nn.functional.cross_entropy(net(train_NTD[rows]), labels_N[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        return float((net.eval()(test_NTD).argmax(1) == test_labels_N).double().mean())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(DEFAULT_MODELS), help="trained from scratch")
    parser.add_argument("--minutes", type=float, default=45.0, help="for all models from scratch together")
    parser.add_argument("--epochs", type=int, default=None, help="instead of what fits into --minutes")
    parser.add_argument("--precision", default="auto", choices=("auto", "no", "bf16"), help="auto: whichever is faster")
    parser.add_argument("--num-frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--timed-batch", type=int, default=4, help="clips of the batch that is timed for the plan")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--out", type=Path, default=HERE / "accuracy.jsonl")
    parser.add_argument("--runs", type=Path, default=HERE / "runs", help="folder of the runs' checkpoints")
    parser.add_argument("--methods", nargs="+", default=["scratch", "probe"], choices=("scratch", "probe"))
    parser.add_argument("--plan-only", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    done = {
        (r["model"], r["method"], r.get("seed", options.seed))
        for r in (read_json_lines(options.out) if options.out.exists() else [])
    }
    jobs: list[tuple[str, str, Callable[[], Record]]] = []
    if "probe" in options.methods and not options.plan_only:
        pairs = list(zip(PROBES, PROBE_METHODS, strict=True))
        jobs += [(name, method, partial(probe, name, method, options)) for name, method in pairs]
    if "scratch" in options.methods and any((n, "scratch", options.seed) not in done for n in options.models):
        is_known = options.epochs is not None and options.precision != "auto"
        how = (options.precision, options.epochs) if is_known and not options.plan_only else plan(options)
        jobs += [(name, "scratch", partial(scratch, name, *how, options)) for name in options.models]
    if options.plan_only:
        return
    jobs = [job for job in jobs if (job[0], job[1], options.seed) not in done]
    with json_lines(options.out, append=True) as write:
        for number, (name, method, work) in enumerate(jobs, start=1):
            print(f"{number} of {len(jobs)}: {name}, {method}", flush=True)
            about = {"model": name, "method": method, "seed": options.seed, "data": "JHMDB split 1"}
            try:
                found = work()
            except Exception as error:  # one model's failure leaves the others
                print(f"{name}, {method} failed: {type(error).__name__}: {error}", flush=True)
                continue
            write({**about, **found, "command": " ".join(["python", *sys.argv]), "machine": machine()})
            print(f"   top-1 {100 * found['top1']:.1f} %, {found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
