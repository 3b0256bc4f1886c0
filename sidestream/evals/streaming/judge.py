"""``judge``: a circuit on labelled clips, offline and live (or on a simulated device); its answers, to be scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sidestream.circuit.wire import Circuit
from sidestream.errors import InputError, ModelError
from sidestream.evals.metrics import points_from_maps
from sidestream.evals.streaming.labelled import LabelledClip
from sidestream.evals.streaming.live import JudgedFrame, ToValue, run_live, run_offline, run_simulated
from sidestream.evals.streaming.log import Answer, FrameTruth
from sidestream.evals.streaming.simulated import SimulatedDevice
from sidestream.evals.streaming.values import Classes, Points
from sidestream.models.heads import CELL_PX
from sidestream.types import InputSpec, Output
from sidestream.video.prepare import unprepare_points


@dataclass
class Judged:
    """What a circuit answered on all clips, and what was true."""

    truths: list[FrameTruth] = field(default_factory=list)
    offline: list[Answer] = field(default_factory=list)
    streaming: list[Answer] = field(default_factory=list)
    num_clips: int = 0


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
