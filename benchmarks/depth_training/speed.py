"""Frames per second of one training step on one clip, every method in turn, again and again, in the same run.

Two cores: two workers of one intra-op thread each, two stages, cut where the two halves take the same time (measured
at the start). Skip-Sideways needs three stages: it has four, in two workers. A step ends with SGD (momentum 0.9) on
all weights. "Idle" is the share of two workers' time in which they were not inside a stage.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpipe import GPipe
from nets import make, random_frames
from peers import Peers, unavailable
from schedules import fresh_pairs
from torch import nn
from torch.nn import functional as F

from sidestream.circuit.balance import partition
from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.wiring import parallel, pipelined
from sidestream.engine import run
from sidestream.engine.rules.exact import Exact
from sidestream.engine.rules.sideways import Sideways

NUM_WORKERS = 2
NUM_MICRO = 8
SGD = functools.partial(torch.optim.SGD, lr=1e-4, momentum=0.9)
Step = Callable[[], tuple[float, list[float]]]
"""Seconds of a step, and the seconds that each stage was at work."""


def costs(net: dict[str, Any], num_frames: int, size_px: int) -> list[float]:
    """Seconds of each layer, forward and back, on one thread: the median of five."""
    layers = make(net)
    x = random_frames(num_frames, size_px)[0]
    found = []
    for n, layer in enumerate(layers):
        times = []
        for _ in range(6):
            given = x.detach().requires_grad_(n > 0)
            started = time.perf_counter()
            out = layer(given)
            out.backward(torch.ones_like(out))
            times.append(time.perf_counter() - started)
        found.append(statistics.median(times[1:]))
        x = out.detach()
    return found


def backprop(net: dict[str, Any], clip: Any, *, num_threads: int, frame_by_frame: bool = False) -> Step:
    """All frames of the clip at once, or the same gradient frame by frame, which is the talk's picture of BP."""
    modules = make(net)
    whole, optimizer = nn.Sequential(*modules), SGD([p for m in modules for p in m.parameters()])

    def step() -> tuple[float, list[float]]:
        torch.set_num_threads(num_threads)
        started = time.perf_counter()
        for x, y in fresh_pairs(*clip) if frame_by_frame else [clip]:
            (F.cross_entropy(whole(x), y) * (len(y) / len(clip[1]))).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
        torch.set_num_threads(1)
        return seconds, [seconds] if num_threads == 1 else []

    return step


def by_rule(net: dict[str, Any], clip: Any, rule: Any, *, skips: str = "none", executor: str = "threads") -> Step:
    stages = stages_of(make(net), clip[0][:1], skips=skips)
    circuit = pipelined(stages) if skips == "none" else parallel(stages)

    def step() -> tuple[float, list[float]]:
        started = time.perf_counter()
        running = run(circuit, fresh_pairs(*clip), rule=rule, executor=executor, num_threads=NUM_WORKERS)
        for _ in running:
            pass
        return time.perf_counter() - started, list(running.stats.busy_seconds)

    return step


def gpipe(net: dict[str, Any], clip: Any) -> Step:
    modules = make(net)
    pipe = GPipe(modules, F.cross_entropy, num_threads=NUM_WORKERS)
    optimizer = SGD([p for m in modules for p in m.parameters()])

    def step() -> tuple[float, list[float]]:
        started = time.perf_counter()
        done = pipe.step(clip[0].chunk(NUM_MICRO), clip[1].chunk(NUM_MICRO))
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started, done.busy_seconds

    return step


def torch_pipelining(peers: Peers, schedule: str, num_frames: int, size_px: int, num_micro: int) -> Step:
    def step() -> tuple[float, list[float]]:
        ranks = peers.step(schedule, num_micro=num_micro, num_frames=num_frames, size_px=size_px)
        return max(r["seconds"] for r in ranks), [r["busy_seconds"] for r in ranks]

    return step


def candidates(setting: dict[str, Any], peers: Peers | None, halves: Any, quarters: Any) -> dict[str, Step]:
    net, num_frames, size_px = setting["net"], setting["num_frames"], setting["size_px"]
    clip = random_frames(num_frames, size_px)
    two, four = {**net, "splits": halves}, {**net, "splits": quarters}
    loss = F.cross_entropy
    found: dict[str, Step] = {
        "backprop, 1 thread": backprop(net, clip, num_threads=1),
        "backprop, 2 threads": backprop(net, clip, num_threads=NUM_WORKERS),
        "backprop, frame by frame, 1 thread": backprop(net, clip, num_threads=1, frame_by_frame=True),
        f"ours, GPipe, {NUM_MICRO} micro-batches": gpipe(two, clip),
        "ours, 1F1B": by_rule(two, clip, Exact(loss, optimizers=SGD)),
        "ours, 1F1B, recomputing": by_rule(two, clip, Exact(loss, optimizers=SGD, keep="inputs")),
        "ours, Sideways, step per clip": by_rule(two, clip, Sideways(loss, optimizers=SGD, update="clip")),
        "ours, Sideways, step per tick": by_rule(two, clip, Sideways(loss, optimizers=SGD)),
        "ours, Sideways, 4 stages": by_rule(four, clip, Sideways(loss, optimizers=SGD, update="clip")),
        "ours, Skip-Sideways, 4 stages": by_rule(
            four, clip, Sideways(loss, optimizers=SGD, update="clip"), skips="projection"
        ),
    }
    if peers is not None:
        for schedule, name in (("gpipe", "GPipe"), ("1f1b", "1F1B")):
            for num_micro in (NUM_MICRO, num_frames):
                title = f"torch, {name}, {num_micro} micro-batches, 2 processes"
                found[title] = torch_pipelining(peers, schedule, num_frames, size_px, num_micro)
    return found


def settings(quick: bool) -> list[dict[str, Any]]:
    if quick:
        return [{"net": {"vgg": "vgg8_quarter"}, "num_frames": 16, "size_px": 32, "repeats": 2}]
    return [
        {"net": {"vgg": "vgg8"}, "num_frames": 32, "size_px": 112, "repeats": 5},
        {"net": {"vgg": "vgg8_quarter"}, "num_frames": 64, "size_px": 112, "repeats": 7},
    ]


def measure(*, quick: bool = False) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    for setting in settings(quick):
        each = costs(setting["net"], 1, setting["size_px"])
        halves, quarters = partition(each, 2), partition(each, 4)
        print(setting, [f"{1e3 * c:.2f} ms" for c in each], halves, quarters, flush=True)
        peers = None if unavailable() else Peers({**setting["net"], "splits": list(halves)}, lr=1e-4)
        try:
            yield from _interleaved(setting, candidates(setting, peers, list(halves), list(quarters)), each, halves)
        finally:
            if peers is not None:
                peers.close()


def _interleaved(
    setting: dict[str, Any], steps: dict[str, Step], each: list[float], halves: Any
) -> Iterator[dict[str, Any]]:
    times: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in steps}
    for repeat in range(setting["repeats"] + 1):
        for name, step in steps.items():
            found = step()
            if repeat:  # the first is warm-up
                times[name].append(found)
    base = [seconds for seconds, _ in times["backprop, 1 thread"]]
    for name, found in times.items():
        ratios = [b / seconds for b, (seconds, _) in zip(base, found, strict=True)]
        case = {"net": setting["net"]["vgg"], "size_px": setting["size_px"], "num_frames": setting["num_frames"]}
        record = {
            "case": {**case, "method": name, "repeats": setting["repeats"]},
            "seconds": [seconds for seconds, _ in found],
            "busy_seconds": [busy for _, busy in found],
            "ratios": ratios,
            "layer_seconds": each,
            "split_after": list(halves),
        }
        print(f"{name:50s} {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]", flush=True)
        yield record
