"""Peak memory of a model at test, and at training against the length of the clip, with a guard before each case."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidestream.errors import StageError
from sidestream.evals.footprint import Case, Footprint, measure_footprint
from sidestream.report.measure import memory_bytes, proc_kib

if TYPE_CHECKING:
    from sidestream.evals.compare import Setting

MAX_SHARE = 0.8
"""Of the memory that is free, what a case may be expected to need."""


def memory_records(
    name: str, setting: Setting, known: dict[tuple[Any, ...], dict[str, Any]], say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """The clip form and the stream at ``num_frames``, then training steps from short to long clips."""
    for work in ("clip", "stream"):
        case = _case(name, work, setting.num_frames, setting)
        if ("memory", name, work, setting.num_frames, None) not in known:
            say(f"{name}, {work}")
            yield _measured(case)
    seen: list[tuple[int, int]] = []
    for num_frames in sorted(set(setting.lengths)):
        record = known.get(("memory", name, "train", num_frames, None))
        if record is None:
            say(f"{name}, training step, {num_frames} frames")
            record = _guarded(_case(name, "train", num_frames, setting), seen)
            yield record
        if "peak_bytes" in record:
            seen.append((num_frames, record["peak_bytes"]))


def predicted_bytes(seen: Sequence[tuple[int, int]], num_frames: int) -> float | None:
    """Peak at ``num_frames`` from (frames, bytes) at shorter lengths: growth as from the last but one to the last, and
    in proportion at least. None where nothing was seen."""
    if not seen:
        return None
    last_frames, last_bytes = seen[-1]
    power = 1.0
    if len(seen) > 1 and min(seen[-2][1], last_bytes) > 0:
        power = max(1.0, math.log(last_bytes / seen[-2][1]) / math.log(last_frames / seen[-2][0]))
    return last_bytes * (num_frames / last_frames) ** power


def available_bytes(device: str = "cpu") -> int | None:
    """Memory that is free now; None where the system does not tell."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    try:
        free_kib = proc_kib(Path("/proc/meminfo").read_text(), "MemAvailable")
    except OSError:
        free_kib = None
    limits = [limit for limit in (free_kib and free_kib * 1024, memory_bytes()) if limit]
    return min(limits, default=None)


def _guarded(case: Case, seen: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Measured, or left out with the reason where it would not fit."""
    needed, free = predicted_bytes(seen, case.num_frames), available_bytes(case.device)
    if needed is not None and free is not None and needed > MAX_SHARE * free:
        gib = 2**30
        reason = f"would need about {needed / gib:.1f} GiB, and {free / gib:.1f} GiB are free"
        return {**_about(case), "skipped": reason}
    return _measured(case)


def _measured(case: Case) -> dict[str, Any]:
    try:
        found: Footprint = measure_footprint(case)
    except StageError as error:
        return {**_about(case), "error": str(error)}
    figures = {"peak_bytes": found.peak_bytes, "parameter_bytes": found.parameter_bytes, "is_exact": found.is_exact}
    return {**_about(case), **figures}


def _about(case: Case) -> dict[str, Any]:
    return {"model": case.model, "work": case.work, "num_frames": case.num_frames}


def _case(name: str, work: Any, num_frames: int, setting: Setting) -> Case:
    return Case(
        name,
        work,
        num_frames,
        size_px=setting.size_px,
        answer_every=setting.answer_every,
        num_classes=setting.num_classes,
        num_threads=setting.num_threads,
        device=setting.device,
    )
