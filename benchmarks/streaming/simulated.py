"""JHMDB's test clips at several frame rates on a simulated device, and what that device makes of an endless stream.

The device: the stages' times as measured here on one thread, all ``factor`` times as long, so that the whole net in
sequence takes ``NET_SECONDS``; a worker for each stage, and nothing that they cost each other.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from judging import MODEL, NETS, SIZE_PX, SPEC, Device, Judge, ShownClip, circuit_of, load, stage_times, tallied

from sidestream.circuit.ages import information_latency_ticks, latency_ticks
from sidestream.data import open_dataset
from sidestream.evals.streaming import Points, RuntimeProfile
from sidestream.evals.streaming.dataflow import Dataflow, dataflow
from sidestream.evals.streaming.labelled import labelled_clips
from sidestream.video import prepare

Record = dict[str, Any]
RATES = (5, 10, 15, 25, 30)
NET_SECONDS = 0.1
NUM_TIMED, NUM_JOINTS = 205, 15
NUM_BINS = 4
STREAM_FRAMES = 400
OVERLOAD_RATE = 60.0


def profile() -> Record:
    """Times do not depend on the weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measured = stage_times(load(None, "", NUM_JOINTS), [torch.randn(1, 3, SIZE_PX, SIZE_PX) for _ in range(NUM_TIMED)])
    return {
        "case": {"model": MODEL, "size_px": SIZE_PX},
        "rows_seconds": [[round(s, 8) for s in row] for row in measured.rows_seconds],
        "net_seconds": measured.mean_seconds,
        "factor": NET_SECONDS / measured.mean_seconds,
    }


def device_of(record: Record) -> Device:
    """From the record of ``profile``."""
    return Device(RuntimeProfile(tuple(map(tuple, record["rows_seconds"]))).scaled(record["factor"]))


def timing(device: Device, known: Sequence[Record]) -> Iterator[Record]:
    """Throughput, latencies and busy shares on a long stream; weights do not matter."""
    net = load(None, "", NUM_JOINTS)
    for name in (n for n in NETS if not NETS[n].forecasts):
        circuit = circuit_of(net, NETS[name].wiring)
        ticks = information_latency_ticks(circuit), latency_ticks(circuit)
        for rate in RATES:
            case = {"net": name, "frame_rate": rate}
            if case in known:
                continue
            flow = dataflow(STREAM_FRAMES, circuit, device.profile.draw_rows(rate, seed=0))
            yield {
                "case": case,
                "ticks": ticks,
                "taken_per_s": rate * len(flow.frames) / STREAM_FRAMES,
                "answers_per_s": rate * _per_frame([a.ready for a in flow.answers]),
                "reaction_ms": _milliseconds(reactions(flow, ticks[0]), rate),
                "in_use_ms": _milliseconds(reactions(flow, ticks[0], waits=NETS[name].judged_frame == "newest"), rate),
                "answer_ms": _milliseconds(reactions(flow, ticks[1]), rate),
                "busy": [round(share, 4) for share in flow.busy_shares(flow.stage_busy)],
            }


def overload(device: Device, known: Sequence[Record]) -> Iterator[Record]:
    """A camera faster than the slowest stage: a frame inside for every worker, or as the engine does it."""
    circuit = circuit_of(load(None, "", NUM_JOINTS), "pipelined")
    for name, most in (("a frame per worker", circuit.num_stages), ("as many as full speed needs", None)):
        case = {"inside": name, "frame_rate": OVERLOAD_RATE}
        if case not in known:
            rows = device.profile.draw_rows(OVERLOAD_RATE, seed=0)
            flow = dataflow(2 * STREAM_FRAMES, circuit, rows, max_in_flight=most)
            taken = dict(zip(flow.frames, flow.taken, strict=True))
            yield {
                "case": case,
                "answers_per_s": OVERLOAD_RATE * _per_frame([a.ready for a in flow.answers]),
                "latency_ms": _milliseconds([float(a.ready) - a.frame_index for a in flow.answers], OVERLOAD_RATE),
                "inside_ms": _milliseconds(
                    [float(a.ready - taken[a.frame_index]) for a in flow.answers], OVERLOAD_RATE
                ),
            }


def reactions(flow: Dataflow, ticks: int, *, waits: bool = False) -> list[float]:
    """Frames from the arrival of each frame that was taken up to the answer so many ticks later.

    ``waits``: that answer speaks of the frame that is taken up in its own tick, and counts from when that is.
    """
    found = []
    ready = {a.tick: a.ready for a in flow.answers}
    for tick, frame in enumerate(flow.frames):
        end, is_in_clip = ready.get(tick + ticks), tick + ticks < len(flow.frames)
        if end is not None and (is_in_clip or not waits):
            found.append(float(max(end, flow.taken[tick + ticks]) if waits else end) - frame)
    return found


def _per_frame(ready: Sequence[float]) -> float:
    """Answers a frame period, the first and last tenth left out."""
    tenth = len(ready) // 10
    middle = ready[tenth : len(ready) - tenth]
    return (len(middle) - 1) / (middle[-1] - middle[0])


def _milliseconds(frames: Sequence[float], rate: float) -> list[float]:
    """Median and 95th percentile."""
    ordered = sorted(frames)
    picked = statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return [round(1e3 * value / rate, 2) for value in picked]


def accuracy(
    device: Device, weights: Path, seeds: Sequence[int], known: Sequence[Record], quick: bool
) -> Iterator[Record]:
    """A record per seed, net and rate, with a tally for each bin of the clips' motion."""
    torch.set_num_threads(1)
    for seed in seeds:
        cases = [{"seed": seed, "net": name, "frame_rate": rate} for rate in RATES for name in NETS]
        if all(case in known for case in cases):
            continue
        variants = dict.fromkeys(net.weights for net in NETS.values())
        folder = weights / "runs" if (weights / "runs").is_dir() else weights
        if missing := [
            v for v in variants if not (folder / f"{seed}-small-{v}" / "run" / "last.safetensors").is_file()
        ]:
            print(f"seed {seed}: no weights of {', '.join(missing)} in {folder}; make them by the recipe, with --runs")
            continue
        clips = jhmdb_clips(8 if quick else None)
        edges = bins([clip.motion for clip in clips])
        judge = Judge(lambda variant, s=seed, f=folder: load(f, f"{s}-small-{variant}", NUM_JOINTS), device)
        for name, rate, tallies in tallied(judge, clips, RATES, lambda clip, e=edges: bin_of(clip.motion, e)):
            case = {"seed": seed, "net": name, "frame_rate": rate}
            if case not in known:
                by_bin = [tallies[n].sums if n in tallies else None for n in range(NUM_BINS)]
                yield {"case": case, "motion_bins": by_bin, "motion_edges": [round(e, 5) for e in edges]}


@cache
def jhmdb_clips(max_clips: int | None = None) -> tuple[ShownClip, ...]:
    """The test clips of split 1 that have joints, prepared once."""
    dataset = open_dataset("jhmdb", part="test", split=1)
    found = []
    for clip in labelled_clips(dataset, "keypoints", max_clips=max_clips):
        num_frames = min(len(clip.frames), len(clip.truths))
        frames_TCHW = torch.cat([prepare(frame, SPEC) for frame in clip.frames[:num_frames]])
        values: tuple[Any, ...] = tuple(truth.value for truth in clip.truths[:num_frames])
        found.append(ShownClip(clip.key, frames_TCHW, clip.frames[0].size_px, values, motion_of(values)))
    return tuple(found)


def motion_of(points: Sequence[Points]) -> float:
    """Mean way of a point from frame to frame, as a share of the person's size (the longer side of its box)."""
    places_TP2 = torch.stack([p.points_P2_px for p in points])
    sizes_T = (places_TP2.amax(1) - places_TP2.amin(1)).amax(-1)
    ways_TP = torch.stack([(b - a).norm(dim=-1) for a, b in pairwise(places_TP2)])
    return float((ways_TP.mean(1) / sizes_T[1:].clamp(min=1.0)).mean())


def bins(motions: Sequence[float]) -> list[float]:
    """The motions between ``NUM_BINS`` bins of as many clips each."""
    ordered = sorted(motions)
    return [ordered[round(n * len(ordered) / NUM_BINS)] for n in range(1, NUM_BINS)]


def bin_of(motion: float, edges: Sequence[float]) -> int:
    return sum(motion >= edge for edge in edges)
