"""Nets, clips and a simulated device: what each net's points are worth offline and when they are judged live."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidestream.circuit.net_stages import net_circuit
from sidestream.circuit.stage import State, Values
from sidestream.circuit.wire import Circuit
from sidestream.engine import run
from sidestream.evals.metrics import pck
from sidestream.evals.streaming import Answer, FrameTruth, Pair, Points, RuntimeProfile, counts_of, pair, with_forecast
from sidestream.evals.streaming.dataflow import Dataflow, answers_of, dataflow, values_of_ticks
from sidestream.evals.streaming.judge import points_answer
from sidestream.evals.streaming.live import JudgedFrame
from sidestream.evals.streaming.values import Value
from sidestream.models import create_model, load_weights, model_info
from sidestream.types import Frame, InputSpec

MODEL, SIZE_PX = "par_densenet_tiny", 48
SPEC: InputSpec = model_info(MODEL).input_spec.replace(
    size_px=(SIZE_PX, SIZE_PX), resize_px=None, layout="BCHW", num_frames=1, min_frames=None
)
ALPHA = 0.2
SETTLED = 8
"""The frame from which on every net answers: the parallel one begins in its eighth tick."""
NUM_WARM_UP = 5


@dataclass(frozen=True, slots=True)
class Net:
    """``weights``: the recipe's variant."""

    weights: str
    wiring: str
    judged_frame: JudgedFrame = "answered"
    forecasts: bool = False
    """Whether its points are moved on at constant velocity (``with_forecast``)."""


TWO_GROUPS = "semi-parallel:2:fresh"
NETS = {
    "sequential": Net("sequential", "sequential"),
    "pipelined": Net("sequential", "pipelined"),
    "two groups": Net("two groups, distilled", TWO_GROUPS, "newest"),
    "parallel": Net("parallel, distilled", "parallel", "newest"),
    "sequential, forecast": Net("sequential", "sequential", forecasts=True),
    "pipelined, forecast": Net("sequential", "pipelined", forecasts=True),
}


@dataclass(frozen=True, slots=True, eq=False)
class ShownClip:
    """A clip as the nets are fed it, with the true points of its frames."""

    key: str
    frames_TCHW: Tensor
    size_px: tuple[int, int]
    truths: tuple[Points, ...]
    motion: float
    """Per frame, in sizes of the person (or in speeds)."""

    @property
    def num_frames(self) -> int:
        return len(self.frames_TCHW)

    def frames(self) -> list[Frame]:
        """Stand-ins of the right size and number; ``prepared`` knows what they show."""
        nothing = torch.zeros(1, 1, 1, dtype=torch.uint8).expand(*self.size_px, 3)
        return [Frame(nothing, n, float(n)) for n in range(self.num_frames)]

    def prepared(self, frame: Frame) -> Tensor:
        return self.frames_TCHW[frame.index, None]


@dataclass(frozen=True)
class Device:
    """Runtimes of the stages, a worker for each."""

    profile: RuntimeProfile

    def flow(self, circuit: Circuit, num_frames: int, frame_rate: float, number: int) -> Dataflow:
        """The schedule of the clip of that number: every net meets the same runtimes."""
        return dataflow(num_frames, circuit, self.profile.draw_rows(frame_rate, seed=number))


def load(folder: Path | None, variant: str, num_points: int) -> torch.nn.Module:
    """The recipe's weights of a variant; None: untrained, for a look."""
    net = create_model(MODEL, num_classes=num_points, head="keypoints")
    return net.eval() if folder is None else load_weights(net, folder / variant / "run" / "last.safetensors").eval()


def circuit_of(net: Any, wiring: str) -> Circuit:
    return net_circuit(net, torch.zeros(1, 3, SIZE_PX, SIZE_PX), wiring)


class Judge:
    """One seed's weights on clips. What a net answers when it is fed the same frames is computed once."""

    def __init__(self, weights: Callable[[str], Any], device: Device, nets: Mapping[str, Net] = NETS) -> None:
        loaded = {variant: weights(variant) for variant in dict.fromkeys(net.weights for net in nets.values())}
        self.circuits = {name: circuit_of(loaded[net.weights], net.wiring) for name, net in nets.items()}
        self.plain = {  # nets without memory that mix no frames: an answer is its frame's
            net.weights: circuit_of(loaded[net.weights], "sequential")
            for net in nets.values()
            if net.wiring in ("sequential", "pipelined") and not loaded[net.weights].has_feedback
        }
        self.nets, self.device = nets, device
        self._values: dict[Any, dict[int, Value]] = {}
        self._offline: dict[str, list[Pair]] = {}

    def forget(self) -> None:
        """Call it after each clip."""
        self._values.clear()
        self._offline.clear()

    def pairs(self, name: str, clip: ShownClip, number: int, frame_rate: float) -> tuple[list[Pair], list[Pair]]:
        """Each frame's truth with what was known of it: on a device that takes no time, and on the simulated one."""
        circuit, num_frames = self.circuits[name], clip.num_frames
        truths = [FrameTruth(clip.key, n, n / frame_rate, value) for n, value in enumerate(clip.truths)]
        if name not in self._offline:  # which frame meets which answer is the same at every rate
            idle = dataflow(num_frames, circuit, itertools.repeat((0,) * circuit.num_stages))
            self._offline[name] = pair(truths, self._answers(name, clip, idle, frame_rate))
        answers = self._answers(name, clip, self.device.flow(circuit, num_frames, frame_rate, number), frame_rate)
        live = pair(truths, answers)
        return self._offline[name], with_forecast(live, answers) if self.nets[name].forecasts else live

    def _answers(self, name: str, clip: ShownClip, flow: Dataflow, frame_rate: float) -> list[Answer]:
        net = self.nets[name]
        if net.weights in self.plain and net.judged_frame == "answered":
            values = self._of_ticks(net.weights, self.plain[net.weights], clip, tuple(range(clip.num_frames)))
            values = {a.tick: values[a.frame_index] for a in flow.answers}
        else:
            values = self._of_ticks(name, self.circuits[name], clip, flow.frames)
        return answers_of(flow, values, frame_rate=frame_rate, clip=clip.key, judged_frame=net.judged_frame)

    def _of_ticks(self, name: str, circuit: Circuit, clip: ShownClip, taken: tuple[int, ...]) -> dict[int, Value]:
        key = name, clip.key, taken
        if key not in self._values:
            given: dict[str, Any] = {"answer": points_answer(SPEC), "prepare": clip.prepared}
            self._values[key] = values_of_ticks(circuit, clip.frames(), taken, **given)
        return self._values[key]


def right_of(pairs: Sequence[Pair], point: int | None = None) -> tuple[int, int]:
    """Points within ``ALPHA`` of the size, and points; a frame without an answer has none right.

    ``point``: of that one alone; the size is that of all.
    """
    if not pairs:
        return 0, 0
    truth_NP2, labelled_NP = (
        torch.stack([getattr(p.truth.value, name) for p in pairs]) for name in ("points_P2_px", "scores_P")
    )
    nothing = torch.full_like(truth_NP2[0], float("nan"))
    found = [nothing if p.answer is None else p.answer.value.points_P2_px for p in pairs]  # type: ignore[union-attr]
    counted = pck(torch.stack(found), truth_NP2, alpha=ALPHA, labelled_NP=labelled_NP > 0)
    return (counted.num_right, counted.num_points) if point is None else counted.per_joint[point]


class Tally:
    """Right points of many clips, in all frames and in the settled ones, and how stale their answers were.

    ``centre``: a point that is counted by itself too, in the settled frames. ``settled``: the first of those.
    """

    def __init__(self, centre: int | None = None, settled: int = SETTLED) -> None:
        self._settled = settled
        self._counted: dict[str, tuple[int, int | None]] = {"": (0, None), "settled_": (settled, None)}
        if centre is not None:
            self._counted["settled_centre_"] = settled, centre
        self.sums = {f"{start}{name}": 0 for start in self._counted for name in ("right", "right_offline", "points")}
        self.sums |= dict.fromkeys(("frames", "misses", "settled_misses", "mismatch", "clips"), 0)

    def add(self, offline: Sequence[Pair], live: Sequence[Pair]) -> None:
        for prefix, (first, point) in self._counted.items():
            right, points = right_of(_from(first, live), point)
            self.sums[f"{prefix}right"] += right
            self.sums[f"{prefix}points"] += points
            self.sums[f"{prefix}right_offline"] += right_of(_from(first, offline), point)[0]
        counts = counts_of(live)
        self.sums["misses"] += counts.miss
        self.sums["settled_misses"] += counts_of(_from(self._settled, live)).miss
        self.sums["frames"] += counts.num_frames
        self.sums["mismatch"] += counts.mismatch
        self.sums["clips"] += 1


def _from(first: int, pairs: Sequence[Pair]) -> list[Pair]:
    return [p for p in pairs if p.truth.frame_index >= first]


class _Timed:
    """A stage's step, and the processor time that each took."""

    def __init__(self, step: Callable[[Values, State], tuple[Values, State]]) -> None:
        self.step, self.seconds = step, list[float]()

    def __call__(self, inputs: Values, state: State) -> tuple[Values, State]:
        started = time.thread_time()
        found = self.step(inputs, state)
        self.seconds.append(time.thread_time() - started)
        return found


def stage_times(net: Any, frames: Iterable[Tensor]) -> RuntimeProfile:
    """Of the stages in a row on one thread, frame after frame."""
    circuit = circuit_of(net, "sequential")
    timed = [_Timed(stage.step) for stage in circuit.stages]
    stages = tuple(replace(stage, step=step) for stage, step in zip(circuit.stages, timed, strict=True))
    for _ in run(circuit.replace(stages=stages), frames, executor="inline"):
        pass
    return RuntimeProfile(tuple(zip(*(t.seconds[NUM_WARM_UP:] for t in timed), strict=True)))


def tallied(
    judge: Judge,
    clips: Sequence[ShownClip],
    rates: Sequence[float],
    group: Callable[[ShownClip], Any],
    centre: int | None = None,
    settled: int = SETTLED,
) -> Iterator[tuple[str, float, Mapping[Any, Tally]]]:
    """Per net and frame rate a tally of each group of clips. ``centre``, ``settled``: see ``Tally``."""
    found: dict[tuple[str, float], dict[Any, Tally]] = {(name, rate): {} for rate in rates for name in judge.nets}
    for number, clip in enumerate(clips):
        for name, rate in found:
            tally = found[name, rate].setdefault(group(clip), Tally(centre, settled))
            tally.add(*judge.pairs(name, clip, number, rate))
        judge.forget()
    for (name, rate), tallies in found.items():
        yield name, rate, tallies
