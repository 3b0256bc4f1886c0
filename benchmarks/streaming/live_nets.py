"""What the part live and its control run: ways to run par_inception, their circuits, and clips behind a lead-in.

OMP_WAIT_POLICY is read once, when a process loads OpenMP. So a process with PASSIVE runs all nets but ``SPINNING``,
and one without runs only that one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sidestream.circuit.net_stages import net_circuit
from sidestream.circuit.wire import Circuit
from sidestream.errors import InputError
from sidestream.evals.streaming import Pair, at_rate, pair, run_live, run_offline
from sidestream.evals.streaming.judge import points_answer
from sidestream.evals.streaming.labelled import LabelledClip
from sidestream.evals.streaming.live import JudgedFrame, ToValue
from sidestream.models import create_model, info_of
from sidestream.models.info import ModelInfo
from sidestream.types import Frame, InputSpec
from sidestream.video import prepare

NETS_FOLDER = Path(__file__).parents[2] / "recipes" / "inception_keypoints" / "runs"
NUM_CLIPS, NUM_CLIPS_SLOW = 12, 6
"""Spread evenly over the test clips with joints, and so of as many classes; the fewer are among the others."""
LEAD_IN, LEAD_IN_RATE = 24, 10.0
"""Frames, and frames a second; both at most."""
ETA_FRAMES = -0.1
"""Frames are asked for a tenth of a frame's time after they are due. An answer that was made in advance is held until
its frame is taken up, which on a real clock is a millisecond late; asked at the very moment it would never count."""
POLICY, PASSIVE = "OMP_WAIT_POLICY", "PASSIVE"


@dataclass(frozen=True, slots=True)
class Net:
    """A way to run the net: ``lag``: of its head; ``num_threads``: workers, or threads inside of each operator."""

    lag: int
    wiring: str
    executor: str
    num_threads: int
    judged_frame: JudgedFrame = "answered"


SPINNING = "sequential, 2 threads, spinning"
NETS = {
    "sequential, 1 thread": Net(0, "sequential", "sequential", 1),
    "sequential, 2 threads": Net(0, "sequential", "sequential", 2),
    SPINNING: Net(0, "sequential", "sequential", 2),
    "pipelined, 2 groups": Net(0, "semi-parallel:2", "threads", 2),
    "pipelined, 10 stages": Net(0, "pipelined", "threads", 2),
    "predictive, 2 groups": Net(1, "semi-parallel:2", "threads", 2, "newest"),
    "predictive, 5 groups": Net(4, "semi-parallel:5", "threads", 2, "newest"),
    "predictive, 10 stages": Net(9, "parallel", "threads", 2, "newest"),
}


def is_passive(environment: Mapping[str, str] = os.environ) -> bool:
    return environment.get(POLICY, "").upper() == PASSIVE


def nets_of_process(environment: Mapping[str, str] = os.environ) -> dict[str, Net]:
    """Those that a process with this environment runs."""
    return {name: net for name, net in NETS.items() if (name == SPINNING) != is_passive(environment)}


def other_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The same for a process that runs the rest."""
    plain = {name: value for name, value in environment.items() if name != POLICY}
    return plain if is_passive(environment) else {**plain, POLICY: PASSIVE}


def prepared_on(spec: InputSpec, device: str) -> Callable[[Frame], Any]:
    """``prepare``, and the input on the device."""
    return lambda frame: prepare(frame, spec).to(device)


def points_on(spec: InputSpec, device: str) -> ToValue:
    """``points_answer`` of maps that lie on the device."""
    answer = points_answer(spec)
    return answer if device == "cpu" else lambda output: answer(replace(output, value=output.value.cpu()))


class Loaded:
    """The nets with a head of their own, each loaded once, and their offline answers, each made once."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self._folder, self._device = folder, device
        self._models: dict[int, tuple[Any, InputSpec]] = {}
        self._offline: dict[tuple[int, str], list[Pair]] = {}

    def circuit(self, net: Net) -> tuple[Circuit, InputSpec]:
        model, spec = self._model(net.lag)
        return net_circuit(model, torch.zeros(1, 3, *spec.size_px, device=self._device), net.wiring), spec

    def offline(self, net: Net, clip: LabelledClip) -> list[Pair]:
        """Each truth with the answer that a machine without end would have given by then."""
        key = net.lag, clip.key
        if key not in self._offline:
            circuit, spec = self.circuit(net)
            made: dict[str, Any] = {"answer": points_on(spec, self._device), "prepare": self.prepared(spec)}
            answers = run_offline(circuit, clip.frames, clip=clip.key, judged_frame=net.judged_frame, **made)
            self._offline[key] = pair(clip.truths, answers, eta_frames=ETA_FRAMES)
        return self._offline[key]

    def prepared(self, spec: InputSpec) -> Callable[[Frame], Any]:
        return prepared_on(spec, self._device)

    def _model(self, lag: int) -> tuple[Any, InputSpec]:
        if lag not in self._models:
            folder = self._folder / f"lag-{lag}-seed-0"
            if not folder.is_dir():
                raise InputError(f"there is no net in {folder}; make it by recipes/inception_keypoints.py --seeds 0")
            model = create_model(str(folder)).eval().to(self._device)
            info: ModelInfo = info_of(model)  # type: ignore[assignment]  # create_model hangs one on every model
            self._models[lag] = model, info.input_spec.replace(layout="BCHW", num_frames=1, min_frames=None)
        return self._models[lag]


def num_clips(rate: float, quick: bool = False) -> int:
    """At 5 frames a second a clip takes long, and nobody is late."""
    return 1 if quick else NUM_CLIPS_SLOW if rate <= 5 else NUM_CLIPS


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


def warm_up(loaded: Loaded, nets: Iterable[Net], clip: LabelledClip) -> None:
    """A few frames through every net: what is done only once in a process is done here."""
    for net in nets:
        circuit, spec = loaded.circuit(net)
        few = list(clip.frames[:4])
        given: dict[str, Any] = {"executor": net.executor, "num_threads": net.num_threads}
        given["prepare"] = loaded.prepared(spec)
        run_live(circuit, few, answer=points_answer(spec), clip="warm-up", **given)
