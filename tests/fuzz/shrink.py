"""Make a failing program smaller while it still fails."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from fuzz.program import Line, Program

_ASSIGNED = re.compile(r"^\(?(v\d+(?:, \(?v\d+)*)[^=]* = (.*)$")
_NAME = re.compile(r"\b[vx]\d+\b")


def shrunk(program: Program, still_fails: Callable[[Program], bool], *, seconds: float = 60.0) -> Program:
    """A program that fails too, and from which nothing more can be taken (or the time is over)."""
    stop_at = time.monotonic() + seconds
    seen: set[str] = set()
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for smaller in _smaller(program):
            if time.monotonic() > stop_at:
                return program
            key = repr(smaller)
            if key not in seen:
                seen.add(key)
                if still_fails(smaller):
                    program, is_smaller = smaller, True
                    break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    yield from _without_lines(program)
    yield from _with_less_answer(program)
    yield from _simpler_surroundings(program)
    yield from _simpler_lines(program)


def _without_lines(program: Program) -> Iterator[Program]:
    lines = program.lines
    for size in (8, 4, 2, 1):
        for start in range(len(lines) - size, -1, -size):
            yield program.replace(lines=lines[:start] + lines[start + size :])


def _with_less_answer(program: Program) -> Iterator[Program]:
    leaves = program.leaves
    if len(leaves) > 1:
        for n in range(len(leaves)):
            yield program.replace(leaves=leaves[:n] + leaves[n + 1 :], structure="tuple")
    if program.structure != "single":
        yield program.replace(structure="single" if len(leaves) == 1 else "tuple")


def _simpler_surroundings(program: Program) -> Iterator[Program]:
    for change in (
        {"calling": "positional"},
        {"is_training": False},
        {"is_frozen": True},
        {"layouts": ("contiguous",)},
        {"num_frames": 2},
        {"num_frames": 3},
        {"lines": tuple(replace(line, region=0) for line in program.lines)},
    ):
        is_other = any(getattr(program, name) != value for name, value in change.items())
        if is_other and change.get("num_frames", 0) < program.num_frames:
            yield program.replace(**change)
    text = " ".join([*(line.code for line in program.lines), *program.leaves])
    for n, given in enumerate(program.inputs):
        others = program.inputs[:n] + program.inputs[n + 1 :]
        if others and given.name not in _NAME.findall(text):
            yield program.replace(inputs=others)
        simple = replace(given, layout="contiguous", same_as="")
        if simple != given:
            yield program.replace(inputs=(*program.inputs[:n], simple, *program.inputs[n + 1 :]))


def _simpler_lines(program: Program) -> Iterator[Program]:
    """A value in place of one that is computed from it, or a plain product in place of what is computed."""
    for n, line in reversed(list(enumerate(program.lines))):
        if (found := _ASSIGNED.match(line.code)) is None:
            continue
        names, right = _NAME.findall(found[1]), found[2]
        for other in dict.fromkeys(_NAME.findall(right)):
            if other in names:
                continue
            yield _renamed(program, n, names, other)
            simple = f"{' = '.join(names)} = {other} * 2.0"
            if simple != line.code:
                lines = (*program.lines[:n], Line(simple, line.region), *program.lines[n + 1 :])
                yield program.replace(lines=lines)


def _renamed(program: Program, n: int, names: list[str], other: str) -> Program:
    """Without line ``n``, and with ``other`` wherever its values were read."""

    def new(text: str) -> str:
        return re.sub(rf"\b({'|'.join(names)})\b", other, text)

    lines = (*program.lines[:n], *(replace(line, code=new(line.code)) for line in program.lines[n + 1 :]))
    return program.replace(lines=lines, leaves=tuple(map(new, program.leaves)))
