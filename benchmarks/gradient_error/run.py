"""How wrong Sideways' gradients are: against frame rate, motion, depth and learning rate, and as motion vanishes.

    python benchmarks/gradient_error/run.py         # needs SIDESTREAM_DATA with weizmann in it; writes all files here

Trains a small VGG-8 on Weizmann by backprop, then compares pseudo- and true gradients on clips of actors that it has
not seen, before and after that training. Writes results.jsonl, table.md and gradient_error.png here.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.wire import Circuit
from sidestream.circuit.wiring import pipelined
from sidestream.data import ClipDataset, open_dataset
from sidestream.models.vgg8 import vgg8
from sidestream.report.measure import machine
from sidestream.report.record import json_lines
from sidestream.train import TrainConfig, fit
from sidestream.train.diagnose import gaps_of, gradient_errors
from sidestream.train.diagnostics import stage_records
from sidestream.train.gradient_bound import error_bounds
from sidestream.train.gradient_error import GradientError
from sidestream.types import InputSpec
from sidestream.video.synthetic import SyntheticVideo

HERE = Path(__file__).parent
SIZE_PX, NUM_CLASSES, HELD_OUT = 64, 10, "daria,eli"
STEPS, SPEEDS, DEPTHS = (1, 2, 4, 8), (0.0, 0.25, 0.5, 1.0, 2.0, 4.0), (2, 3, 4, 5, 6, 8)
RATES, SHARES = (0.0, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1), (1.0, 0.1, 0.01, 1e-3, 1e-4)
NUM_STAGES, NUM_FRAMES, NUM_DEEP_FRAMES = 4, 12, 20
NUM_ITERATIONS = 1
"""Of power iteration: more make the gains, and so the bounds, a little larger."""
Clip = tuple[list[Tensor], int]
Case = dict[str, Any]


def dataset(part: Any, num_frames: int) -> ClipDataset:
    spec = InputSpec(
        size_px=(SIZE_PX, SIZE_PX), mean=(0.5,) * 3, std=(0.25,) * 3, layout="BTCHW", num_frames=num_frames
    )
    return open_dataset("weizmann", part=part, split=HELD_OUT, spec=spec)


def long_clips(num_clips: int) -> list[Clip]:
    """Of actors held out, one per class at most: (8 x 11 + 1) frames that really are there."""
    data, found = dataset("test", STEPS[-1] * (NUM_FRAMES - 1) + 1), {}
    for item in (data[n] for n in range(len(data))):
        if len(set(item.pts_seconds)) == len(item.pts_seconds):
            found.setdefault(item.label, (list(item.clip_TCHW.unsqueeze(1)), item.label))
    return list(found.values())[:num_clips]


def synthetic_clip(seed: int, speed: float) -> Clip:
    video = SyntheticVideo(seed=seed, size_px=(SIZE_PX, SIZE_PX), speed=speed)
    frames = [video.frame(n).rgb_HWC.permute(2, 0, 1)[None].float() / 255 for n in range(NUM_FRAMES)]
    return [(frame - 0.5) / 0.25 for frame in frames], 0


def smooth(net: nn.Module) -> nn.Module:
    """The same weights, with softplus for ReLU and mean for max-pooling."""
    net = copy.deepcopy(net)
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.Softplus(beta=4))
            elif isinstance(child, nn.MaxPool2d):
                setattr(parent, name, nn.AvgPool2d(2))
    return net


def circuit_of(net: Any, num_stages: int, frame: Tensor) -> Circuit:
    """The eight layers in so many groups of consecutive ones: the same net, so the same true gradients."""
    layers = net.depth_modules()
    ends = [round(n * len(layers) / num_stages) for n in range(num_stages + 1)]
    return pipelined(stages_of([nn.Sequential(*layers[a:b]) for a, b in pairwise(ends)], frame))


def compare(net: nn.Module, clip: Clip, num_stages: int, rate: float | None = None) -> list[dict[str, Any]]:
    """A record per stage, and one for the whole net (stage 0), with frozen weights or (rate) an update per tick."""
    frames, label = clip
    circuit, targets = circuit_of(net, num_stages, frames[0]), [torch.tensor([label])] * len(frames)
    if rate is not None:
        sgd = functools.partial(torch.optim.SGD, lr=rate)
        moving = gradient_errors(circuit, frames, targets, F.cross_entropy, optimizers=sgd)
        records = stage_records(moving)
        changes = {n: [e.weight_change for e in moving if e.stage == n] for n in range(1, num_stages + 1)}
        records = [r | {"weight_change": sum(changes[r["stage"]]) / len(changes[r["stage"]])} for r in records]
        return [*records, whole_net(moving, num_stages)]
    found = gradient_errors(circuit, frames, targets, F.cross_entropy)
    gaps = gaps_of(circuit, found)
    bounds, constants = error_bounds(circuit, frames, targets, F.cross_entropy, gaps, num_iterations=NUM_ITERATIONS)
    known = ((e, bounds[e.stage, e.cotangent_frame]) for e in found)
    found = [replace(e, bound=b.bound, motion_bound=b.motion_bound) for e, b in known]
    records = stage_records(found)
    for record, own in zip(records, constants, strict=True):
        record |= {"slope": own.slope, "parameter_slope": own.parameter_slope, "gain": own.gain}
    return [*records, whole_net(found, num_stages)]


def whole_net(errors: Sequence[GradientError], num_stages: int) -> dict[str, Any]:
    """The gradient of all stages as one vector, of the frames for which all stages have one."""
    cosines, ratios, error, true = [], [], 0.0, 0.0
    for frame in {e.cotangent_frame for e in errors}:
        own = [e for e in errors if e.cotangent_frame == frame]
        if len(own) == num_stages:
            dot = sum(e.cosine * e.norm * e.true_norm for e in own if e.norm and e.true_norm)
            norm, true_norm = (math.hypot(*(getattr(e, name) for e in own)) for name in ("norm", "true_norm"))
            cosines.append(dot / (norm * true_norm))
            ratios.append(norm / true_norm)
            error, true = error + math.hypot(*(e.error for e in own)), true + true_norm
    mean = sum(cosines) / len(cosines), sum(ratios) / len(ratios)
    return {"stage": 0, "cosine": mean[0], "norm_ratio": mean[1], "error": error / true}


def cases(clips: Sequence[Clip]) -> Iterator[tuple[Case, list[Clip], dict[str, Any]]]:
    """What is varied, the clips, and the options of ``compare``."""
    row = {"num_stages": NUM_STAGES}
    for step in STEPS:
        yield {"study": "frame step", "value": step}, [(c[::step][:NUM_FRAMES], y) for c, y in clips], row
    for speed in SPEEDS:
        yield {"study": "speed", "value": speed}, [synthetic_clip(seed, speed) for seed in range(len(clips))], row
    for depth in DEPTHS:
        deep = [(c[:NUM_DEEP_FRAMES], y) for c, y in clips]
        yield {"study": "stages", "value": depth}, deep, {"num_stages": depth}
    for rate in RATES:
        deep = [(c[:NUM_DEEP_FRAMES], y) for c, y in clips]
        yield {"study": "learning rate", "value": rate}, deep, row | {"rate": rate}
    for share in SHARES:
        shrunk = [([c[0] + share * (f - c[0]) for f in c[:NUM_FRAMES]], y) for c, y in clips]
        yield {"study": "share of motion", "value": share}, shrunk, row


def trained(net: nn.Module, epochs: int) -> dict[str, Any]:
    config = TrainConfig(epochs=epochs, batch_size=8, lr=0.02, task="frame", device="cpu", num_workers=1, clip_norm=1.0)
    with tempfile.TemporaryDirectory() as folder:
        result = fit(net, dataset("train", 8), dataset("test", 8), config=config, out=Path(folder) / "run")
    last = result.history[-1]
    return {"epochs": epochs, **{k: last[k] for k in ("train_loss", "train_accuracy", "test_accuracy")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    started = time.monotonic()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fresh = vgg8(NUM_CLASSES, width=0.25).eval()
    net = copy.deepcopy(fresh)
    training = trained(net, given.epochs)
    print(training, f"{time.monotonic() - started:.0f} s", flush=True)
    clips = long_clips(given.clips)
    nets = {"fresh": fresh, "trained": net, "smooth": smooth(net)}
    with json_lines(given.out / "results.jsonl") as write:
        write({"training": training, "num_clips": len(clips), "machine": machine()})
        for case, some, options in cases(clips):
            for name, each in nets.items():
                if name == ("fresh" if case["study"] == "share of motion" else "smooth"):
                    continue
                for number, clip in enumerate(some):
                    for record in compare(each, clip, **options):
                        write({**case, "net": name, "clip": number, **record})
            print(case, f"{time.monotonic() - started:.0f} s", flush=True)
    from table import write_all

    write_all(given.out / "results.jsonl", given.out)
    print(f"{time.monotonic() - started:.0f} s, of which {time.process_time():.0f} s of one core")


if __name__ == "__main__":
    main()
