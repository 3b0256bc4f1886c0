"""Stages in parallel, each on another frame: one stream, or several through the same stages (``pool``).

No more frames are let in than the circuit's registers hold in a tick, and on a live source no more than full speed
needs (``in_flight``).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import TypeVar

from sidestream.clock import Clock
from sidestream.engine.executors.in_flight import LiveLimit, limit_in_flight
from sidestream.engine.executors.lane import Lane
from sidestream.engine.executors.pool import Pool
from sidestream.engine.feed import Feed
from sidestream.engine.tick import Machine
from sidestream.types import Output

Answer = TypeVar("Answer")


def threads(
    machine: Machine, feed: Feed, *, clock: Clock, num_workers: int, max_in_flight: int | None = None
) -> Iterator[Output]:
    """Answers in order, equal to ``inline``'s to the bit.

    ``max_in_flight``: frames inside at once; at most the circuit's latency in ticks + 1 (default: that, but no more
    than ``num_workers`` + 1, since more frames than workers only wait; on a live source no more than ``num_workers``,
    and than full speed needs by the times that the stages take).
    """
    pool = Pool([Lane(machine, feed, _limit(machine, feed, num_workers, max_in_flight))], clock)
    return _only(_answers(pool, [feed], num_workers))


def many_threads(
    machines: Sequence[Machine], feeds: Sequence[Feed], *, clock: Clock, num_workers: int
) -> Generator[tuple[int, Output]]:
    """Answers of several streams as they come, each with the number of its stream; those of a stream in order.

    Each stream may have the frames of one answer inside, and more while the others leave workers idle.
    """
    limits = [_limit(machine, feed, num_workers, None) for machine, feed in zip(machines, feeds, strict=True)]
    pool = Pool([Lane(*lane) for lane in zip(machines, feeds, limits)], clock)
    return _answers(pool, feeds, num_workers)


def _only(answers: Generator[tuple[int, Output]]) -> Iterator[Output]:
    with closing(answers):
        for _, output in answers:
            yield output


def _answers(pool: Pool, feeds: Sequence[Feed], num_workers: int) -> Generator[tuple[int, Output]]:
    pool.start(num_workers)
    try:
        yield from drained_on_interrupt(pool.next_answer, *feeds)
    finally:
        pool.shut_down()


def drained_on_interrupt(next_answer: Callable[[], Answer | None], *feeds: Feed) -> Iterator[Answer]:
    """Answers until there are no more. Ctrl-C while waiting for one ends the feeds; when all that was in flight is
    answered, KeyboardInterrupt is raised. A second Ctrl-C does not wait."""
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            output = next_answer()
        except KeyboardInterrupt as error:
            if interrupt is not None:
                raise
            interrupt = error
            for feed in feeds:
                feed.stop()
            continue
        if output is None:
            break
        yield output
    if interrupt is not None:
        raise interrupt


def _limit(machine: Machine, feed: Feed, num_workers: int, max_in_flight: int | None) -> int | LiveLimit:
    if feed.wants_latency:
        return LiveLimit(machine, num_workers, max_in_flight)
    return limit_in_flight(machine, num_workers, max_in_flight, is_live=False)
