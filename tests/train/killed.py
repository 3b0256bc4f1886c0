"""Runs of all rules, which the tests kill; as a program: ``killed.py FOLDER RESUME NAME``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from train.layered import NUM_CLASSES, Layered
from train.streamed import Recurrent

from sidestream.data import ClipOptions, synthetic_dataset
from sidestream.models.parallel_densenet import ParDenseNet
from sidestream.train import TrainConfig, TrainResult, fit
from sidestream.types import InputSpec

SPEC = InputSpec(size_px=(10, 10), mean=(0.5,) * 3, std=(0.25,) * 3, layout="BTCHW", num_frames=7)
CONFIG = TrainConfig(epochs=3, batch_size=4, lr=0.05, device="cpu", checkpoint_minutes=0.0, seed=3, optimizer="adamw")
"""Checkpoint minutes 0: one after every batch."""
RUNS: dict[str, dict[str, Any]] = {
    "exact, every clip": {"rule": "exact"},
    "exact, every tick": {"rule": "exact", "update": "tick", "keep": "inputs and weights"},
    "sideways, every clip": {"rule": "sideways", "executor": "threads"},
    "sideways, every tick": {"rule": "sideways", "update": "tick"},
    "sideways, every five ticks": {"rule": "sideways", "update": 5},
    "exact, through state": {"rule": "exact", "state_ticks": 3, "num_stages": 3},
    "sideways, through state, every tick": {"rule": "sideways", "state_ticks": 3, "num_stages": 3, "update": "tick"},
    "truncated": {"rule": "backprop", "task": "frame", "bptt_frames": 3},
    "unrolled, with feedback": {"rule": "unrolled", "wiring": "parallel", "target": "newest", "feedback_wire": True},
}


def run_of(folder: Path, name: str, *, resume: bool = False) -> TrainResult:
    torch.manual_seed(0)
    options = RUNS[name]
    net: nn.Module
    if {"state_ticks", "bptt_frames"} & options.keys():
        net = Recurrent()
    elif options["rule"] == "unrolled":
        net = ParDenseNet(NUM_CLASSES, stages=(3, 1), growth=2, stem=4, bottleneck=2, num_layers=1)
    else:
        net = Layered(batch_norm="keep" not in options)
    parts = [synthetic_dataset(part=p, spec=SPEC, num_clips=12, options=ClipOptions()) for p in ("train", "test")]
    return fit(net, *parts, config=CONFIG.replace(**options), out=folder, resume=resume)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_of(Path(sys.argv[1]), sys.argv[3], resume=sys.argv[2] == "resume")
