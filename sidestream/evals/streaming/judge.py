"""``judge``: a circuit on labelled clips, offline and live (or on a simulated device); its answers, to be scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sidestream.circuit.ages import latency_ticks, mixes_ages
from sidestream.circuit.wire import Circuit
from sidestream.errors import InputError, ModelError
from sidestream.evals.metrics import points_from_maps
from sidestream.evals.streaming.labelled import LabelledClip
from sidestream.evals.streaming.live import JudgedFrame, ToValue, run_live, run_offline, run_simulated
from sidestream.evals.streaming.log import Answer, FrameTruth
from sidestream.evals.streaming.runtimes import RuntimeProfile
from sidestream.evals.streaming.schedule import Work, one_device, pipeline, unlimited_devices
from sidestream.evals.streaming.values import Classes, Points
from sidestream.models.heads import CELL_PX
from sidestream.types import InputSpec, Output
from sidestream.video.prepare import unprepare_points

UNLIMITED = "unlimited"
"""The policy of a device for every frame."""


@dataclass
class Judged:
    """What a circuit answered on all clips, and what was true."""

    truths: list[FrameTruth] = field(default_factory=list)
    offline: list[Answer] = field(default_factory=list)
    streaming: list[Answer] = field(default_factory=list)
    num_clips: int = 0


@dataclass(frozen=True)
class SimulatedDevice:
    """Runtimes and a scheduling rule in place of a clock."""

    profile: RuntimeProfile
    frame_rate: float
    policy: str = "idle-free"
    """A name of ``POLICIES`` or "unlimited"; a circuit with delays takes up every frame that it can."""
    seed: int = 0

    def schedule(self, circuit: Circuit, num_frames: int, clip_number: int) -> list[Work]:
        """The schedule of one clip. A profile with a column per stage of a circuit with delays is a pipeline."""
        rate, seed = self.frame_rate, self.seed + clip_number
        if self.policy == UNLIMITED:
            return unlimited_devices(num_frames, self.profile.draw(rate, seed=seed))
        if self.profile.num_stages > 1 and latency_ticks(circuit) > 0:
            if self.profile.num_stages != circuit.num_stages:
                raise InputError(
                    f"runtimes of {self.profile.num_stages} stages for a circuit of {circuit.num_stages}; give as many"
                )
            rows = self.profile.draw_rows(rate, seed=seed)
            num_ticks = latency_ticks(circuit) + 1
            return pipeline(num_frames, rows, lockstep=mixes_ages(circuit), num_ticks=num_ticks)
        expected = self.profile.mean_seconds * rate
        return one_device(num_frames, self.profile.draw(rate, seed=seed), policy=self.policy, expected=expected)


def judge(
    circuit: Circuit,
    clips: Iterable[LabelledClip],
    *,
    answer: ToValue,
    device: SimulatedDevice | None = None,
    streaming: bool = True,
    judged_frame: JudgedFrame = "answered",
    on_clip: Callable[[str], None] = lambda key: None,
    **options: Any,
) -> Judged:
    """Run the circuit over every clip: offline (every frame, in no time), then live.

    Args:
        device: simulated; None runs in real time on this machine.
        streaming: False: offline only.
        judged_frame: see ``live.JudgedFrame``.
        options: ``prepare``, ``executor`` and ``num_threads`` of ``run``.
    """
    found = Judged()
    prepare = options.get("prepare")
    for number, clip in enumerate(clips):
        on_clip(clip.key)
        found.num_clips += 1
        found.truths += clip.truths
        given: dict[str, Any] = {"answer": answer, "clip": clip.key, "judged_frame": judged_frame}
        found.offline += run_offline(circuit, clip.frames, prepare=prepare, **given)
        if streaming and device is None:
            found.streaming += run_live(circuit, list(clip.frames), **given, **options)
        elif streaming and device is not None:
            works = device.schedule(circuit, len(clip.frames), number)
            rate = device.frame_rate
            found.streaming += run_simulated(circuit, clip.frames, works, frame_rate=rate, prepare=prepare, **given)
    if not found.num_clips:
        raise InputError("there is no clip to judge by; give one or more")
    return found


def classes_answer(top_k: int = 5) -> ToValue:
    """From logits (1, N) to the ``top_k`` best classes."""

    def answer(output: Output) -> Classes:
        value = output.value
        if not (isinstance(value, Tensor) and value.ndim == 2 and value.shape[0] == 1):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ModelError(f"the model answers {shape}; expected class logits of shape (1, classes)")
        if not value.isfinite().all():
            raise ModelError("the model answers with logits that are NaN or infinite; check its weights")
        best = torch.topk(value[0].float(), min(top_k, value.shape[1]))
        return Classes(tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))

    return answer


def points_answer(spec: InputSpec, *, cell_px: float = CELL_PX, window: int | None = 2) -> ToValue:
    """From heat maps (1, P, H, W) of a frame that was prepared by ``spec`` to points in the frame's own pixels.

    ``window``: see ``points_from_maps``; 2 takes the cells around the largest one.
    """

    def answer(output: Output) -> Points:
        value = output.value
        if not (isinstance(value, Tensor) and value.ndim == 4 and value.shape[0] == 1):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ModelError(f"the model answers {shape}; expected heat maps of shape (1, joints, H, W)")
        if output.frame is None:
            raise InputError("points belong to a frame; run the circuit on frames, not on bare tensors")
        points_1P2, scores_1P = points_from_maps(value.float(), cell_px, window=window)
        points_P2 = unprepare_points(points_1P2[0], output.frame.size_px, spec)
        return Points(points_P2, scores_1P[0])

    return answer


def constant_profile(runtimes_ms: Iterable[float]) -> RuntimeProfile:
    """A device whose stages always take as long, in milliseconds."""
    return RuntimeProfile((tuple(ms / 1e3 for ms in runtimes_ms),))
