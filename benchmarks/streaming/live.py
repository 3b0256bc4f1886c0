"""par_inception at a camera's rate on this machine, in real time: in sequence, pipelined, and predicting.

    SIDESTREAM_DATA=... OMP_WAIT_POLICY=PASSIVE python benchmarks/streaming/run.py --parts live

It takes 25 minutes and wants a quiet machine.

Needs the nets of recipes/inception_keypoints.py (seed 0). JHMDB's test clips are shown at ``RATES``; all nets see a
clip at one rate right after each other, so that what else the machine does meets all of them. A record is one clip,
rate and net; those that are known are not measured again. Nets that predict are judged as of the newest frame:
``evals.streaming`` holds their answer until the frame of which it speaks is there. Without PASSIVE, two threads inside
of an operator spin for each other, and where anything else wants a core a frame takes seconds.

A stream of 40 frames is too short for a trunk that looks back on dozens. So each clip is led in by its first frames
shown backwards (``LEAD_IN`` of them), slowly enough (``LEAD_IN_RATE``) for every net to take up nearly all, and only
the clip itself is judged and booked.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from sidestream.circuit.ages import information_latency_ticks
from sidestream.circuit.net_stages import net_circuit
from sidestream.circuit.wire import Circuit
from sidestream.data import open_dataset
from sidestream.engine.rules.forward import Forward
from sidestream.engine.tick import Cell, Message
from sidestream.errors import InputError
from sidestream.evals.metrics import pck
from sidestream.evals.streaming import Answer, Pair, at_rate, counts_of, pair, run_live, run_offline
from sidestream.evals.streaming.judge import points_answer
from sidestream.evals.streaming.labelled import LabelledClip, labelled_clips
from sidestream.evals.streaming.live import JudgedFrame
from sidestream.models import create_model, info_of
from sidestream.models.info import ModelInfo
from sidestream.report.measure import machine
from sidestream.types import Frame, InputSpec
from sidestream.video import prepare

HERE = Path(__file__).parent
NETS_FOLDER = HERE.parents[1] / "recipes" / "inception_keypoints" / "runs"
PART = "live"
RATES = (5, 10, 15, 25, 30)
NUM_CLIPS = 7
LEAD_IN, LEAD_IN_RATE = 24, 10.0
"""Frames, and frames a second; both at most."""
ALPHA = 0.2
ETA_FRAMES = -0.1
"""Frames are asked for a tenth of a frame's time after they are due. An answer that was made in advance is held until
its frame is taken up, which on a real clock is a millisecond late; asked at the very moment it would never count."""


@dataclass(frozen=True, slots=True)
class Net:
    """A way to run the net: ``lag``: of its head; ``num_threads``: workers, or threads inside of each operator."""

    lag: int
    wiring: str
    executor: str
    num_threads: int
    judged_frame: JudgedFrame = "answered"


NETS = {
    "sequential, 1 thread": Net(0, "sequential", "sequential", 1),
    "sequential, 2 threads": Net(0, "sequential", "sequential", 2),
    "pipelined, 2 groups": Net(0, "semi-parallel:2", "threads", 2),
    "pipelined, 10 stages": Net(0, "pipelined", "threads", 2),
    "predictive, 2 groups": Net(1, "semi-parallel:2", "threads", 2, "newest"),
    "predictive, 5 groups": Net(4, "semi-parallel:5", "threads", 2, "newest"),
    "predictive, 10 stages": Net(9, "parallel", "threads", 2, "newest"),
}


class Booked(Forward):
    """The forward rule, with the time that each thread is at work. One for each run."""

    def __init__(self) -> None:
        self._spans: list[tuple[int, float, float]] = []

    def fire(self, cell: Cell, messages: Sequence[Message]) -> Sequence[Message]:
        begin = time.perf_counter()
        found = super().fire(cell, messages)
        self._spans.append((threading.get_ident(), begin, time.perf_counter()))
        return found

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


class Taken:
    """``prepare`` of a run, which notes the frames that were taken up. One for each run."""

    def __init__(self, spec: InputSpec) -> None:
        self._spec, self.frames = spec, list[int]()

    def __call__(self, frame: Frame) -> Any:
        self.frames.append(frame.index)
        return prepare(frame, self._spec)


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


class Loaded:
    """The nets with a head of their own, each loaded once, and their offline answers, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._models: dict[int, tuple[Any, InputSpec]] = {}
        self._offline: dict[tuple[int, str], list[Pair]] = {}

    def circuit(self, net: Net) -> tuple[Circuit, InputSpec]:
        model, spec = self._model(net.lag)
        return net_circuit(model, torch.zeros(1, 3, *spec.size_px), net.wiring), spec

    def offline(self, net: Net, clip: LabelledClip) -> list[Pair]:
        """Each truth with the answer that a machine without end would have given by then."""
        key = net.lag, clip.key
        if key not in self._offline:
            circuit, spec = self.circuit(net)
            given: dict[str, Any] = {"answer": points_answer(spec), "clip": clip.key, "judged_frame": net.judged_frame}
            answers = run_offline(circuit, clip.frames, prepare=spec, **given)
            self._offline[key] = pair(clip.truths, answers, eta_frames=ETA_FRAMES)
        return self._offline[key]

    def _model(self, lag: int) -> tuple[Any, InputSpec]:
        if lag not in self._models:
            folder = self._folder / f"lag-{lag}-seed-0"
            if not folder.is_dir():
                raise InputError(f"there is no net in {folder}; make it by recipes/inception_keypoints.py --seeds 0")
            model = create_model(str(folder)).eval()
            info: ModelInfo = info_of(model)  # type: ignore[assignment]  # create_model hangs one on every model
            self._models[lag] = model, info.input_spec.replace(layout="BCHW", num_frames=1, min_frames=None)
        return self._models[lag]


def measure(quick: bool, known: list[dict[str, Any]], *, nets_folder: Path = NETS_FOLDER) -> Iterator[dict[str, Any]]:
    """A record per rate, clip and net that is not ``known`` (records, or what is in their "case")."""
    torch.set_num_threads(1)
    cases = [record.get("case", record) for record in known]
    loaded = Loaded(nets_folder)
    dataset = open_dataset("jhmdb", part="test", split=1)
    where = machine()
    rates, num_clips = ((10, 25), 1) if quick else (RATES, NUM_CLIPS)
    is_warm = False
    for rate in rates:
        for plain in labelled_clips(dataset, "keypoints", frame_rate=float(rate), max_clips=num_clips):
            clip = led_in(plain, float(rate))
            for name, net in NETS.items():
                case = {"rate": rate, "clip": clip.key, "net": name}
                if case in cases:
                    continue
                if not is_warm:
                    warm_up(loaded, clip)
                    is_warm = True
                circuit, spec = loaded.circuit(net)
                record = live(circuit, net, clip, spec, rate=float(rate), offline=loaded.offline(net, clip))
                print(f"{rate} frames/s, {name}, {clip.key}: {record['right']} of {record['num_points']}", flush=True)
                yield {"part": PART, "case": case, **record, "quick": quick, "machine": where}


def led_in(clip: LabelledClip, rate: float) -> LabelledClip:
    """The clip behind its first frames, from the last of them back to the second; truth only of the clip itself."""
    before = clip.frames[LEAD_IN:0:-1]
    lead_rate = min(rate, LEAD_IN_RATE)
    start_seconds = len(before) / lead_rate
    after = [
        replace(frame, index=len(before) + n, pts_seconds=start_seconds + n / rate)
        for n, frame in enumerate(clip.frames)
    ]
    frames = (*at_rate(before, lead_rate), *after)
    truths = tuple(
        replace(truth, frame_index=frame.index, pts_seconds=frame.pts_seconds)
        for truth, frame in zip(clip.truths, frames[len(before) :], strict=False)
    )
    return replace(clip, frames=frames, truths=truths)


def warm_up(loaded: Loaded, clip: LabelledClip) -> None:
    """A few frames through every net: what is done only once in a process is done here."""
    for net in NETS.values():
        circuit, spec = loaded.circuit(net)
        few = list(clip.frames[:4])
        given: dict[str, Any] = {"executor": net.executor, "num_threads": net.num_threads, "prepare": spec}
        run_live(circuit, few, answer=points_answer(spec), clip="warm-up", **given)


def live(
    circuit: Circuit, net: Net, clip: LabelledClip, spec: InputSpec, *, rate: float, offline: list[Pair]
) -> dict[str, Any]:
    """One clip, shown once in real time; what is booked begins where its truth begins."""
    first, start_seconds = clip.truths[0].frame_index, clip.truths[0].pts_seconds
    rule, taken, state, begun = Booked(), Taken(spec), Machine(), time.perf_counter()
    answers = run_live(
        circuit,
        list(clip.frames),
        answer=points_answer(spec),
        clip=clip.key,
        executor=net.executor,
        judged_frame=net.judged_frame,
        prepare=taken,
        num_threads=net.num_threads,
        rule=rule,
    )
    seconds, (ours, others) = time.perf_counter() - begun, state.cores()
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
    }


def reactions(
    answers: Sequence[Answer], taken: Sequence[int], delay_ticks: int, due_seconds: Sequence[float]
) -> Iterator[float]:
    """Seconds from when the newest frame that an answer has seen was due until the answer could be used."""
    position = {frame: n for n, frame in enumerate(taken)}
    for answer in answers:
        yield answer.ready_seconds - due_seconds[taken[position[answer.frame_index] - delay_ticks]]


def right_of(pairs: Sequence[Pair]) -> tuple[int, int]:
    """Points within ``ALPHA`` of the person's size, and all; a frame without an answer has none that is right."""
    truth: Any = torch.stack([p.truth.value.points_P2_px for p in pairs])  # type: ignore[union-attr]
    labelled_NP = torch.stack([p.truth.value.scores_P > 0 for p in pairs])  # type: ignore[union-attr]
    nothing = torch.full_like(truth[0], float("nan"))
    points = [nothing if p.answer is None else p.answer.value.points_P2_px for p in pairs]  # type: ignore[union-attr]
    counted = pck(torch.stack(points), truth, alpha=ALPHA, labelled_NP=labelled_NP)
    return counted.num_right, counted.num_points


def rounded_ms(values_seconds: Any) -> list[float]:
    return [round(1e3 * seconds, 1) for seconds in values_seconds]
