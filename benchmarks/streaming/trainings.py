"""Every way of training of recipes/predictive_keypoints, judged live: JHMDB's test clips on the simulated device.

Distilled or not, with feedback or without, by which rule and with which batch norms: at one frame rate, each net in its
own wiring, on the frames of which all of them have an answer. Seeds and variants without weights are left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from judging import TWO_GROUPS, Device, Judge, Net, load, tallied
from simulated import NUM_JOINTS, jhmdb_clips

Record = dict[str, Any]
FRAME_RATE = 30.0
SETTLED = 16
"""With feedback the parallel net begins in its fifteenth tick, when its first answer has gone round."""
WIRINGS = {"sequential": "sequential", "two groups": TWO_GROUPS, "parallel": "parallel"}


def nets_in(folder: Path, seed: int) -> dict[str, Net]:
    """The variants that have weights of the seed, in the recipe's order of wirings."""
    found = {}
    for name, wiring in WIRINGS.items():
        for file in sorted(folder.glob(f"{seed}-small-{name}*/run/last.safetensors")):
            variant = file.parts[-3].removeprefix(f"{seed}-small-")
            found[variant] = Net(variant, wiring, "answered" if name == "sequential" else "newest")
    return found


def measure(
    device: Device, weights: Path, seeds: Sequence[int], known: Sequence[Record], quick: bool
) -> Iterator[Record]:
    """A record per seed and variant."""
    torch.set_num_threads(1)
    for seed in seeds:
        nets = {v: net for v, net in nets_in(weights, seed).items() if {"seed": seed, "net": v} not in known}
        for variant, net in nets.items():
            judge = Judge(lambda v, s=seed: load(weights, f"{s}-small-{v}", NUM_JOINTS), device, {variant: net})
            clips = jhmdb_clips(8 if quick else None)
            for name, _, tallies in tallied(judge, clips, (FRAME_RATE,), lambda clip: "", settled=SETTLED):
                yield {"case": {"seed": seed, "net": name}, "frame_rate": FRAME_RATE, **tallies[""].sums}


def table_of(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: means and ranges over the seeds, of the settled frames."""
    rows = []
    for name in dict.fromkeys(r["case"]["net"] for r in records):
        own = [r for r in records if r["case"]["net"] == name]
        behind = sum(r["mismatch"] for r in own) / max(1, sum(r["frames"] - r["misses"] for r in own))
        shares = ([r[which] / r["settled_points"] for r in own] for which in ("settled_right_offline", "settled_right"))
        rows.append([name, *map(spread, shares), f"{behind:.2f}", str(len(own))])
    return ["trained as", "PCK@0.2 offline, %", "live, %", "frames behind", "seeds"], rows


def spread(shares: Sequence[float]) -> str:
    """Mean, and least and greatest, in percent."""
    mean, ends = statistics.mean(shares), (min(shares), max(shares))
    return f"{100 * mean:.1f} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"
