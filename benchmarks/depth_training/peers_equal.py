"""torch.distributed.pipelining beside ours on the same two stages: equal gradients, and memory per process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gradients import autograd, by_rule
from nets import make, random_frames
from peers import SCHEDULES, Peers, gradients_in, unavailable
from torch import Tensor


def worst_by_parameter(found: Sequence[dict[str, Tensor]], true: Sequence[dict[str, Tensor]]) -> float:
    """The largest difference of any parameter, relative to that parameter's largest entry."""
    return max(
        float((found[n][name] - g).abs().max() / g.abs().max()) for n, own in enumerate(true) for name, g in own.items()
    )


def split(vectors: Sequence[Tensor], modules: Sequence[torch.nn.Module]) -> list[dict[str, Tensor]]:
    """One long vector per stage, by parameter again."""
    return [
        {
            name: part.view_as(p)
            for (name, p), part in zip(m.named_parameters(), v.split([p.numel() for p in m.parameters()]), strict=True)
        }
        for m, v in zip(modules, vectors, strict=True)
    ]


def measure(*, quick: bool = False) -> Iterator[dict[str, Any]]:
    if (reason := unavailable()) is not None:
        yield {"case": {"what": "unavailable"}, "reason": reason}
        return
    yield from _equality(quick)
    yield from _memory(quick)


def _equality(quick: bool) -> Iterator[dict[str, Any]]:
    num_frames, size_px, num_micro = (8, 32, 4) if quick else (16, 64, 8)
    for dtype in ("float32", "float64"):
        net = {"vgg": "vgg8_quarter", "splits": [2], "dtype": dtype}
        modules = make(net)
        frames_TCHW, labels_T = random_frames(num_frames, size_px, dtype)
        true = split(autograd(modules, frames_TCHW, labels_T), modules)
        ours = {
            rule: split(by_rule(rule, modules, frames_TCHW, labels_T)[0], modules)
            for rule in ("gpipe", "1f1b", "1f1b, recomputing")
        }
        for rule, found in ours.items():
            yield {
                "case": {"what": "equality", "who": f"ours, {rule}", "dtype": dtype},
                "from_autograd": worst_by_parameter(found, true),
            }
        with Peers(net) as peers, tempfile.TemporaryDirectory() as folder:
            for schedule in SCHEDULES:
                peers.step(schedule, num_micro=num_micro, num_frames=num_frames, size_px=size_px, save=folder)
                found = gradients_in(Path(folder))
                yield {
                    "case": {"what": "equality", "who": f"torch, {schedule}", "dtype": dtype},
                    "from_autograd": worst_by_parameter(found, true),
                    "from_ours": worst_by_parameter(found, ours["1f1b"]),
                }


def _memory(quick: bool) -> Iterator[dict[str, Any]]:
    """The row of eight stages, four per process; the first step of a fresh pair of processes is a small one."""
    size_px, lengths = (16, (16,)) if quick else (48, (16, 64))
    for schedule in SCHEDULES:
        for num_frames in lengths:
            for num_micro in (8, num_frames):
                with Peers({"row": 8, "splits": [4]}, exact_memory=True) as peers:
                    peers.step(schedule, num_micro=4, num_frames=4, size_px=16)
                    ranks = peers.step(schedule, num_micro=num_micro, num_frames=num_frames, size_px=size_px)
                case = {"what": "memory", "schedule": schedule, "num_frames": num_frames, "num_micro": num_micro}
                print(case, [round(r["peak_bytes"] / 2**20, 1) for r in ranks], flush=True)
                yield {"case": {**case, "num_stages": 8, "size_px": size_px}, "ranks": ranks}
