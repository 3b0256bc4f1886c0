"""The log between run and score: JSON lines of answers with the time each was ready; and the ground truth likewise.

Line 1 names the format; every other line is a frame. Times are seconds from the moment when the clip's first frame
was due, so that ``pts_seconds`` is when a frame was due and compares with ``ready_seconds``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestream.errors import InputError
from sidestream.evals.streaming.values import Value, from_record, to_record
from sidestream.report.record import json_lines

FilePath = str | os.PathLike[str]
ANSWERS, TRUTH, VERSION = "sidestream answers", "sidestream truth", 1


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a run on a clip."""

    clip: str
    frame_index: int
    """The frame that it answers, counted in the clip."""
    pts_seconds: float
    """When that frame was due."""
    arrived_seconds: float
    """When it was made available."""
    ready_seconds: float
    """When the answer was complete."""
    value: Value


@dataclass(frozen=True, slots=True)
class FrameTruth:
    """What is really in a frame."""

    clip: str
    frame_index: int
    pts_seconds: float
    value: Value


def write_answers(path: FilePath, answers: Iterable[Answer], *, about: Mapping[str, Any] | None = None) -> None:
    """Write a log, beside and then renamed. ``about``: plain values: which model, machine, frame rate ..."""
    with json_lines(path) as write:
        write({"format": ANSWERS, "version": VERSION, "about": dict(about or {})})
        for a in answers:
            times = {"arrived_seconds": a.arrived_seconds, "ready_seconds": a.ready_seconds}
            write({**_place(a), **times, "answer": to_record(a.value)})


def write_truth(path: FilePath, truths: Iterable[FrameTruth], *, about: Mapping[str, Any] | None = None) -> None:
    """Write ground truth, beside and then renamed."""
    with json_lines(path) as write:
        write({"format": TRUTH, "version": VERSION, "about": dict(about or {})})
        for t in truths:
            write({**_place(t), "truth": to_record(t.value)})


def read_answers(path: FilePath) -> tuple[list[Answer], dict[str, Any]]:
    """The answers and what the log is about.

    Raises ``InputError``, with the number of the line, for anything that ``write_answers`` does not write.
    """
    return _read(path, ANSWERS, _answer)


def read_truth(path: FilePath) -> tuple[list[FrameTruth], dict[str, Any]]:
    """The truths and what they are about. Raises ``InputError`` as ``read_answers`` does."""
    return _read(path, TRUTH, _truth)


def _place(item: Answer | FrameTruth) -> dict[str, Any]:
    return {"clip": item.clip, "frame": item.frame_index, "pts_seconds": item.pts_seconds}


def _answer(record: dict[str, Any]) -> Answer:
    _check_keys(record, ("clip", "frame", "pts_seconds", "arrived_seconds", "ready_seconds", "answer"))
    ready, arrived = _seconds(record, "ready_seconds"), _seconds(record, "arrived_seconds")
    if ready < arrived:
        raise InputError(f"the answer was ready at {ready} s, before its frame arrived at {arrived} s")
    clip, frame, pts = _read_place(record)
    return Answer(clip, frame, pts, arrived, ready, from_record(record["answer"]))


def _truth(record: dict[str, Any]) -> FrameTruth:
    _check_keys(record, ("clip", "frame", "pts_seconds", "truth"))
    return FrameTruth(*_read_place(record), from_record(record["truth"]))


def _read(path: FilePath, form: str, parse: Callable[[dict[str, Any]], Any]) -> tuple[list[Any], dict[str, Any]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {str(path)!r}: {error}; give a file of {form}") from error
    if text and not text.endswith("\n"):
        raise InputError(f"{path} ends in the middle of a line; it was cut off, so make it again")
    records = [_parsed(line, f"{path}, line {n}") for n, line in enumerate(text.split("\n")[:-1], start=1)]
    head = records[0] if records else {}
    if head.get("format") != form or head.get("version") != VERSION or not isinstance(head.get("about"), dict):
        raise InputError(f"{path} does not begin as a file of {form}, version {VERSION}, does")
    items, seen = [], set()
    for number, record in enumerate(records[1:], start=2):
        try:
            item = parse(record)
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
        if (place := (item.clip, item.frame_index)) in seen:
            raise InputError(f"{path}, line {number}: frame {item.frame_index} of {item.clip!r} is there twice")
        seen.add(place)
        items.append(item)
    return items, head["about"]


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line, parse_constant=_no_constant)
    except ValueError as error:
        raise InputError(f"{where} is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{where} is a {type(record).__name__}; expected an object")
    return record


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number that JSON knows")


def _check_keys(record: dict[str, Any], keys: tuple[str, ...]) -> None:
    if set(record) != set(keys):
        raise InputError(f"the keys are {sorted(record)}; expected {', '.join(keys)}")


def _read_place(record: dict[str, Any]) -> tuple[str, int, float]:
    clip, frame = record["clip"], record["frame"]
    if not isinstance(clip, str):
        raise InputError(f"clip is {clip!r}; expected a name")
    if isinstance(frame, bool) or not isinstance(frame, int) or frame < 0:
        raise InputError(f"frame is {frame!r}; expected a whole number from 0 on")
    return clip, frame, _seconds(record, "pts_seconds")


def _seconds(record: dict[str, Any], name: str) -> float:
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{name} is {value!r}; expected seconds")
    return float(value)
