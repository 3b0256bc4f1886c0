"""One thread, one tick after the other, stages in order of depth: the oracle of all executors."""

from __future__ import annotations

from collections.abc import Iterator

from sidestream.clock import Clock
from sidestream.engine.feed import Feed
from sidestream.engine.tick import Machine
from sidestream.types import Output


def inline(machine: Machine, feed: Feed, *, clock: Clock) -> Iterator[Output]:
    """Answers in order. Every cell fires exactly once per tick; an answer exists when its tick ends.

    Ctrl-C ends it at once: the stage at work is the caller's own thread.
    """
    for leaves, fed in feed:
        machine.feed(leaves, fed)
        for cell in machine.cells:
            machine.fire(cell)
        yield from _answer(machine, clock)
    machine.end()  # the pipeline drains: the last frames' answers come out
    while not machine.is_finished:
        for cell in machine.cells:
            if cell.is_ready:
                machine.fire(cell)
        yield from _answer(machine, clock)


def _answer(machine: Machine, clock: Clock) -> Iterator[Output]:
    while machine.can_collect:
        output = machine.collect(clock.now())[1]
        if output is not None:
            yield output
