"""When do the forward and backward waves of delayed neurons come close to the gradient? Input speed against depth.

    python benchmarks/diffusion/run.py                  # --quick for a look (two seeds, fewer speeds; into quick/)

Pseudo-gradients of sidestream.engine.rules.diffusion against backprop's gradient of the frame that the arriving error
is about, per layer and tick, at random weights that do not move. Writes results.jsonl, table.md and diffusion.png here.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, mse_loss

from sidestream.engine.rules.diffusion import diffusion
from sidestream.report import json_lines, machine
from sidestream.video.synthetic import SyntheticVideo

HERE = Path(__file__).parent
DEPTHS, SEEDS, NUM_TICKS, WIDTH = (2, 4, 8, 16), 5, 24, 32
SPEEDS = {"sinusoids": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0), "shapes": (1 / 16, 1 / 4, 1.0, 4.0, 16.0)}
SLOW_NEURONS = [(depth, tau) for depth in (4, 8) for tau in (2, 4)]
GAIN = 1.2

Pairs = list[tuple[Tensor, Tensor]]


def sinusoids(speed: float, num_frames: int, seed: int) -> Pairs:
    """32 numbers, each the sum of four sinusoids of 0.5 to 1.5 times ``speed`` radians a tick, of power 1; the target
    is a fixed random projection of the frame on four numbers."""
    generator = torch.Generator().manual_seed(seed)
    rate, phase = (
        torch.rand(2, WIDTH, 4, generator=generator).double() + torch.tensor([0.5, 0.0]).view(2, 1, 1)
    ).unbind()
    project = torch.randn(WIDTH, 4, generator=generator).double() / WIDTH**0.5
    ticks_T11 = torch.arange(num_frames).double().view(-1, 1, 1)
    frames_TD = (speed * rate * ticks_T11 + 2 * torch.pi * phase).sin().sum(-1) / 2**0.5
    return [(x.unsqueeze(0), (x @ project).unsqueeze(0)) for x in frames_TD]


def shapes(speed: float, num_frames: int, seed: int) -> Pairs:
    """One shape over a drifting texture, drawn at 128 x 128 px and averaged to 16 x 16; the target is its centre."""
    video = SyntheticVideo(seed, num_frames, (128, 128), num_objects=1, speed=speed)
    pairs = []
    for frame in video:
        rgb_BCHW = frame.rgb_HWC.double().permute(2, 0, 1).unsqueeze(0) / 255
        centre = torch.tensor([float(v) for v in video.shapes[0].centre_px(frame.pts_seconds, (128, 128))]).double()
        pairs.append((avg_pool2d(rgb_BCHW, 8) * 4 - 1.7, (centre / 64 - 1).unsqueeze(0)))
    return pairs


def net(kind: str, depth: int, seed: int) -> list[nn.Module]:
    """tanh layers and a linear one; orthogonal weights with a gain of 1.2, so that the signal lasts through 16."""
    torch.manual_seed(seed)
    if kind == "sinusoids":
        hidden = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(depth - 1)]
        last = nn.Sequential(nn.Linear(WIDTH, 4))
    else:
        widths = [3, *[8] * (depth - 1)]
        hidden = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.Tanh()) for a, b in itertools.pairwise(widths)]
        last = nn.Sequential(nn.Flatten(), nn.Linear(8 * 16 * 16, 2))
    for layer in [*hidden, last]:
        weighted = layer[-1] if isinstance(layer[-1], nn.Linear) else layer[0]
        nn.init.orthogonal_(weighted.weight, gain=GAIN)
        nn.init.zeros_(weighted.bias)
    return [layer.double() for layer in (*hidden, last)]


def exact(layers: Sequence[nn.Module], frame: Tensor, target: Tensor) -> list[Tensor]:
    """Backprop's gradient, one vector per layer."""
    loss = mse_loss(nn.Sequential(*layers)(frame), target)
    found = torch.autograd.grad(loss, [p for layer in layers for p in layer.parameters()])
    return [torch.cat([w.flatten(), b.flatten()]) for w, b in zip(found[::2], found[1::2])]


def gap_ticks(layer: int, depth: int, tau: int) -> int:
    """By how many ticks the input of a layer (from 1) is newer than its error, in the mean."""
    return 2 * (depth - layer) * tau + tau - 1


def measure(kind: str, speed: float, depth: int, tau: int, seed: int) -> dict[str, Any]:
    first = 2 * (depth - 1) if tau == 1 else (2 * depth + 12) * tau  # a lag also has to settle
    pairs = (sinusoids if kind == "sinusoids" else shapes)(speed, first + NUM_TICKS, seed)
    layers = net(kind, depth, seed)
    true: dict[int, list[Tensor]] = {}
    rows = []
    for t, tick in enumerate(diffusion(layers, mse_loss, pairs, time_constant=tau)):
        if t < first:
            continue
        row = []
        for number, found in enumerate(tick.gradients, start=1):
            frame = t - (depth * tau - 1) - (depth - number) * tau
            if frame not in true:
                true[frame] = exact(layers, *pairs[frame])
            right = true[frame][number - 1]
            mine = torch.cat([g.flatten() for g in found.values()])
            cosine = torch.cosine_similarity(mine, right, 0, 1e-300)
            row.append(torch.stack([cosine, mine.norm() / right.norm(), (mine - right).norm() / right.norm()]))
        rows.append(torch.stack(row))
    cosine, ratio, error = torch.stack(rows).median(0).values.T.tolist()
    xs = torch.cat([x for x, _ in pairs])
    change = ((xs[1:] - xs[:-1]).square().mean().sqrt() / xs.square().mean().sqrt()).item()
    gaps = [gap_ticks(n, depth, tau) for n in range(1, depth + 1)]
    return {"change_per_tick": change, "gap_ticks": gaps, "cosine": cosine, "norm_ratio": ratio, "error": error}


def cases(quick: bool) -> list[dict[str, Any]]:
    found = []
    for kind, speeds in SPEEDS.items():
        nets = [(depth, 1) for depth in DEPTHS] + (SLOW_NEURONS if kind == "sinusoids" else [])
        for speed in speeds[::2] if quick else speeds:
            for depth, tau in nets:
                for seed in range(2 if quick else SEEDS):
                    found.append({"kind": kind, "speed": speed, "depth": depth, "tau": tau, "seed": seed})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    if given.quick:
        given.out = given.out / "quick"
        given.out.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    about, started = machine(), time.perf_counter()
    with json_lines(given.out / "results.jsonl") as write:
        for case in cases(given.quick):
            write({"case": case, **measure(**case), "machine": about})
    print(f"measured in {time.perf_counter() - started:.0f} s")
    from table import write_all

    write_all(given.out / "results.jsonl", given.out)


if __name__ == "__main__":
    main()
