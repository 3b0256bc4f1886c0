"""par_inception at a camera's rate on this machine, in real time: in sequence, pipelined, and predicting.

    SIDESTREAM_DATA=... OMP_WAIT_POLICY=PASSIVE python benchmarks/streaming/run.py --parts live

Its clips alone last 37 minutes, and it wants a quiet machine. ``--device cuda --out DIR`` runs the stages on a GPU,
each worker on a stream of its own, and books SM activity (``report.gpu_activity``); never run by us.

Needs the nets of recipes/inception_keypoints.py (seed 0). JHMDB's test clips are shown at ``RATES``; all nets see a
clip at one rate right after each other, so that what else the machine does meets all of them. A record is one clip,
rate and net; those that are known are not measured again. Nets that predict are judged as of the newest frame:
``evals.streaming`` holds their answer until the frame of which it speaks is there. Without PASSIVE, two threads inside
of an operator spin for each other, and where anything else wants a core a frame takes seconds: one net is measured so,
in a process of its own, before the others (``live_nets.nets_of_process``).

A stream of 40 frames is too short for a trunk that looks back on dozens. So each clip is led in by its first frames
shown backwards (``LEAD_IN`` of them), slowly enough (``LEAD_IN_RATE``) for every net to take up nearly all, and only
the clip itself is judged and booked (but for the cores in use, which are of the whole run).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from judging import right_of
from live_nets import (
    ETA_FRAMES,
    NETS_FOLDER,
    PASSIVE,
    POLICY,
    Loaded,
    Net,
    is_passive,
    led_in,
    nets_of_process,
    num_clips,
    points_on,
    prepared_on,
    warm_up,
)

from sidestream.circuit.ages import information_latency_ticks
from sidestream.circuit.wire import Circuit
from sidestream.data import open_dataset
from sidestream.engine.rules.forward import Forward
from sidestream.engine.tick import Cell, Message
from sidestream.evals.streaming import Answer, Pair, counts_of, pair, run_live
from sidestream.evals.streaming.labelled import LabelledClip, labelled_clips
from sidestream.report.gpu_activity import SmActivity, sm_activity
from sidestream.report.measure import machine
from sidestream.types import Frame, InputSpec

PART = "live"
RATES = (5, 10, 15, 25, 30)


class Booked(Forward):
    """The forward rule, with the time that each thread is at work. One for each run.

    On a GPU every thread has a stream, and a stage is done when its kernels are: what it hands on is there.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device, self._own = torch.device(device), threading.local()
        self._spans: list[tuple[int, float, float]] = []

    def fire(self, cell: Cell, messages: Sequence[Message]) -> Sequence[Message]:
        begin = time.perf_counter()
        with self._on_stream():
            found = super().fire(cell, messages)
        self._spans.append((threading.get_ident(), begin, time.perf_counter()))
        return found

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self._device.type == "cpu":
            yield
            return
        stream = self._own.stream = getattr(self._own, "stream", None) or torch.cuda.Stream(self._device)
        with torch.cuda.stream(stream):
            yield
            stream.synchronize()

    def shares(self, num_workers: int, after_seconds: float = 0.0) -> list[float]:
        """Per worker, the busiest first, of the time from so long after the first work began until the last ended."""
        start = min((begin for _, begin, _ in self._spans), default=0.0) + after_seconds
        spans = [(thread, max(begin, start), end) for thread, begin, end in self._spans if end > start]
        if not spans:
            return [0.0] * num_workers
        elapsed = max(end for _, _, end in spans) - start
        busy: dict[int, float] = {}
        for thread, begin, end in spans:
            busy[thread] = busy.get(thread, 0.0) + end - begin
        shares = sorted((seconds / elapsed for seconds in busy.values()), reverse=True)
        return shares + [0.0] * (num_workers - len(shares))


@cache
def meter_of(device: str) -> SmActivity | None:
    """SM activity of a GPU, where its driver tells."""
    return None if device == "cpu" else sm_activity(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


class Taken:
    """``prepare`` of a run, which notes the frames that were taken up. One for each run."""

    def __init__(self, spec: InputSpec, device: str = "cpu") -> None:
        self._prepared, self.frames = prepared_on(spec, device), list[int]()

    def __call__(self, frame: Frame) -> Any:
        self.frames.append(frame.index)
        return self._prepared(frame)


class Machine:
    """What the machine did since the object was made: cores used by this process, and by others."""

    def __init__(self) -> None:
        self._begin = self._now()

    def cores(self) -> tuple[float, float]:
        """Ours, and all others'."""
        elapsed, busy, ours = (now - then for now, then in zip(self._now(), self._begin, strict=True))
        return ours / elapsed, max(0.0, busy - ours) / elapsed

    @staticmethod
    def _now() -> tuple[float, float, float]:
        times = psutil.cpu_times()._asdict()
        busy = sum(v for k, v in times.items() if k not in ("idle", "iowait", "guest", "guest_nice"))
        return time.perf_counter(), busy, time.process_time()


def measure(
    quick: bool, known: list[dict[str, Any]], *, nets_folder: Path = NETS_FOLDER, device: str = "cpu"
) -> Iterator[dict[str, Any]]:
    """A record per rate, clip and net of this process that is not ``known`` (records, or what is in their "case")."""
    torch.set_num_threads(1)
    cases = [record.get("case", record) for record in known]
    loaded, nets = Loaded(nets_folder, device), nets_of_process()
    print(f"{POLICY} {'is' if is_passive() else 'is not'} {PASSIVE} here: {'; '.join(nets)}", flush=True)
    dataset = open_dataset("jhmdb", part="test", split=1)
    where = machine()
    is_warm = False
    for rate in (10, 25) if quick else RATES:
        for plain in labelled_clips(dataset, "keypoints", frame_rate=float(rate), max_clips=num_clips(rate, quick)):
            clip = led_in(plain, float(rate))
            for name, net in nets.items():
                case = {"rate": rate, "clip": clip.key, "net": name}
                if case in cases:
                    continue
                if not is_warm:
                    warm_up(loaded, nets.values(), clip)
                    is_warm = True
                circuit, spec = loaded.circuit(net)
                record = live(circuit, net, clip, spec, offline=loaded.offline(net, clip), device=device)
                print(f"{rate} frames/s, {name}, {clip.key}: {record['right']} of {record['num_points']}", flush=True)
                yield {"part": PART, "case": case, **record, "quick": quick, "machine": where}


def live(
    circuit: Circuit, net: Net, clip: LabelledClip, spec: InputSpec, *, offline: list[Pair], device: str = "cpu"
) -> dict[str, Any]:
    """One clip, shown once in real time; what is booked begins where its truth begins."""
    first, start_seconds = clip.truths[0].frame_index, clip.truths[0].pts_seconds
    rule, taken, state, begun = Booked(device), Taken(spec, device), Machine(), time.perf_counter()
    if (meter := meter_of(device)) is not None:
        meter.begin()
    answers = run_live(
        circuit,
        list(clip.frames),
        answer=points_on(spec, device),
        clip=clip.key,
        executor=net.executor,
        judged_frame=net.judged_frame,
        prepare=taken,
        num_threads=net.num_threads,
        rule=rule,
    )
    seconds, (ours, others) = time.perf_counter() - begun, state.cores()
    activity = None if meter is None else round(meter.share(), 4)
    delay_ticks = information_latency_ticks(circuit) if net.judged_frame == "newest" else 0
    pairs = pair(clip.truths, answers, eta_frames=ETA_FRAMES)
    counts, (num_right, num_points) = counts_of(pairs), right_of(pairs)
    num_frames, num_taken = len(clip.frames) - first, sum(frame >= first for frame in taken.frames)
    own = [a for a in answers if a.frame_index >= first]
    last_ready = max((a.ready_seconds for a in own), default=start_seconds) - start_seconds
    due_seconds = [frame.pts_seconds for frame in clip.frames]
    num_workers = net.num_threads if net.executor == "threads" else 1
    return {
        "lag": net.lag,
        "wiring": net.wiring,
        "executor": net.executor,
        "num_threads": net.num_threads,
        "judged_frame": net.judged_frame,
        "reaction_ticks": information_latency_ticks(circuit),
        "num_frames": num_frames,
        "num_taken": num_taken,
        "num_dropped": num_frames - num_taken,
        "num_answers": len(own),
        "num_lead_in": [first, len(taken.frames) - num_taken],
        "last_ready_seconds": round(last_ready, 4),
        "latency_ms": rounded_ms(a.ready_seconds - a.pts_seconds for a in own),
        "reaction_ms": rounded_ms(reactions(own, taken.frames, delay_ticks, due_seconds)),
        "num_points": num_points,
        "right": num_right,
        "right_at_once": right_of(pair(clip.truths, answers))[0],
        "right_offline": right_of(offline)[0],
        "num_paired": counts.num_frames - counts.miss,
        "in_time": counts.in_time,
        "mismatch": counts.mismatch,
        "busy_shares": [round(share, 3) for share in rule.shares(num_workers, start_seconds)],
        "our_cores": round(ours, 3),
        "others_cores": round(others, 3),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "load_average": round(os.getloadavg()[0], 2),
        "seconds": round(seconds, 2),
        **({} if device == "cpu" else {"device": device, "sm_activity": activity}),
    }


def reactions(
    answers: Sequence[Answer], taken: Sequence[int], delay_ticks: int, due_seconds: Sequence[float]
) -> Iterator[float]:
    """Seconds from when the newest frame that an answer has seen was due until the answer could be used."""
    position = {frame: n for n, frame in enumerate(taken)}
    for answer in answers:
        yield answer.ready_seconds - due_seconds[taken[position[answer.frame_index] - delay_ticks]]


def rounded_ms(values_seconds: Any) -> list[float]:
    return [round(1e3 * seconds, 1) for seconds in values_seconds]
