"""The verdict on a random model: whether it was cut, and answered as the plain model does in every way to run it."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import sidestream as ss
from fuzz.layouts import made_like
from fuzz.program import Program, build, example, frames
from fuzz.ways import WAYS, Case, call_of, copied, difference
from sidestream.errors import CircuitError, CutError

STAGE_COUNTS = (1, 2, 3, 5)


def some_counts(seed: int, number: int) -> tuple[int, ...]:
    """So many of the numbers of stages, others for other seeds."""
    return tuple(random.Random(seed).sample(STAGE_COUNTS, number))


@dataclass(frozen=True)
class Verdict:
    """What became of a program: "right", "refused", "wrong", or "invalid" where the plain model itself fails."""

    kind: str
    reason: str = ""
    check: str = ""
    num_stages: int = 0


def plain_answers(program: Program) -> list[Any]:
    """What the plain model answers, frame after frame, each frame made like the example."""
    model, given = build(program), example(program)
    answers = []
    with torch.no_grad():
        for frame in frames(program):
            args, kwargs = call_of(made_like(frame, given))
            answers.append(copied(model(*args, **kwargs)))
    return answers


def verdict(program: Program, stage_counts: Sequence[int] = STAGE_COUNTS) -> Verdict:
    """The first fault that is found in any number of stages; else a refusal; else "right"."""
    try:
        expected = plain_answers(program)
        if any(difference(a, b) for a, b in zip(plain_answers(program), expected)):
            return Verdict("invalid", "the plain model is not deterministic")
    except Exception as error:
        return Verdict("invalid", f"{type(error).__name__}: {_short(error)}")
    refused = None
    for num_stages in stage_counts:
        found = _verdict_of(program, expected, num_stages)
        if found.kind == "wrong":
            return found
        refused = found if found.kind == "refused" else refused
    return refused or Verdict("right")


def _verdict_of(program: Program, expected: list[Any], num_stages: int) -> Verdict:
    name = "cut"
    try:
        case = _cut(program, expected, num_stages)
        for name, check in WAYS.items():
            case.frames = frames(program)
            check(case)
            name = f"{name}, frames"
            if (reason := difference(case.frames, frames(program))) is not None:
                raise AssertionError(f"the caller's frames were changed: {reason}")
    except (CutError, CircuitError) as error:
        return Verdict("refused", _short(error), name, num_stages)
    except Exception as error:
        return Verdict("wrong", f"{type(error).__name__}: {_short(error)}", name, num_stages)
    return Verdict("right")


def _short(error: BaseException) -> str:
    """The message in one line, without places, names and numbers."""
    text = " ".join(str(error).split())
    text = re.sub(r"cannot be traced at \S+ \(.*?\): ", "cannot be traced: ", text)
    return re.sub(r"model_\d+_\d+\.py", "model.py", text)[:260]


def _cut(program: Program, expected: list[Any], num_stages: int) -> Case:
    """Cut, in fewer stages where the model has fewer places; the model and all else is as before."""
    model, given = build(program), example(program)
    before, example_before, random_before = copied(dict(model.named_buffers())), copied(given), torch.get_rng_state()
    parameters = copied(dict(model.named_parameters()))
    try:
        stages = ss.cut(model, given, num_stages=num_stages, costs="uniform")
    except CutError as error:
        places = re.search(r"has (\d+) places? where a stage can begin, too few", str(error))
        if places is None:
            raise
        stages = ss.cut(model, given, num_stages=int(places[1]), costs="uniform")
    for what, now, then in (
        ("the model's buffers", dict(model.named_buffers()), before),
        ("the model's parameters", dict(model.named_parameters()), parameters),
        ("the example", given, example_before),
        ("torch's random state", torch.get_rng_state(), random_before),
        ("the model's mode", model.training, program.is_training),
    ):
        if (reason := difference(now, then)) is not None:
            raise AssertionError(f"{what} after the cut: {reason}")
    return Case(program, model, stages, expected)
