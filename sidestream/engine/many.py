"""Several streams through one circuit: each with its own state and its own source, one pool of workers, one set of
weights. The oldest frame of all goes first; a stream whose source is slow, drops out or ends holds up no other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from sidestream.circuit.wire import Circuit
from sidestream.clock import Clock
from sidestream.engine.executors.inline import inline
from sidestream.engine.executors.threads import many_threads
from sidestream.engine.feed import Feed
from sidestream.engine.modes import caller_modes
from sidestream.engine.rules.forward import Forward
from sidestream.engine.stats import RunStats
from sidestream.engine.tick import Machine
from sidestream.errors import CircuitError, InputError
from sidestream.types import Output

if TYPE_CHECKING:
    from collections.abc import Generator

EXECUTORS_OF_MANY = ("threads", "inline")


class ManyRun(Iterator[Output]):
    """An iterator of the answers of several streams, as they come; ``Output.source`` names the stream.

    ``stats[name]`` are a stream's books. ``failures[name]`` is what its source raised: the stream ends there, after the
    answers to the frames before; the others go on, and when all have ended the first failure is raised.
    ``stop()`` ends all streams, ``stop(name)`` one; what is in flight is still answered. ``close()`` drops it.
    """

    def __init__(
        self, names: list[str], answers: Generator[tuple[int, Output]], feeds: list[Feed], machines: list[Machine],
        stats: list[RunStats],
    ) -> None:  # fmt: skip
        self._names, self._answers, self._feeds, self._machines = names, answers, feeds, machines
        self._books = stats
        self._has_raised = False

    def __iter__(self) -> ManyRun:
        return self

    def __next__(self) -> Output:
        found = next(self._answers, None)
        if found is None:
            if (failures := self.failures) and not self._has_raised:
                self._has_raised = True
                raise next(iter(failures.values()))
            raise StopIteration
        number, output = found
        self._books[number].book(output)
        return replace(output, source=self._names[number])

    @property
    def stats(self) -> dict[str, RunStats]:
        """The books of each stream."""
        for books, feed, machine in zip(self._books, self._feeds, self._machines, strict=True):
            books.num_frames = feed.num_frames
            books.busy_seconds = tuple(cell.busy_seconds for cell in machine.cells)
        return dict(zip(self._names, self._books, strict=True))

    @property
    def failures(self) -> dict[str, Exception]:
        """What the sources of streams that have ended in failure raised."""
        found = zip(self._names, self._feeds, strict=True)
        return {name: feed.failure for name, feed in found if feed.failure is not None}

    def stop(self, name: str | None = None) -> None:
        """Take no more frames of one stream, or of any. Safe to call from a signal handler."""
        if name is not None and name not in self._names:
            raise InputError(f"there is no stream {name!r}; there are {', '.join(self._names)}")
        for own, feed in zip(self._names, self._feeds, strict=True):
            if name in (None, own):
                feed.stop()

    def close(self) -> None:
        """End now. Answers in flight are lost."""
        self.stop()
        self._answers.close()

    def __enter__(self) -> ManyRun:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def many(
    circuit: Circuit, names: list[str], feeds: list[Feed], *, executor: str, num_threads: int, clock: Clock
) -> ManyRun:
    """See ``engine.run.run_many``."""
    _check_apart(circuit)
    num_workers = 1 if executor == "inline" else min(num_threads, circuit.num_stages * len(names))
    twins = [circuit.replace(stages=tuple(s.twin() for s in circuit.stages)) for _ in range(num_workers - 1)]
    rows = [circuit, *twins]  # stages that one worker at a time can use are there once per worker
    machines = [Machine(rows[n % len(rows)], Forward()) for n in range(len(names))]
    stats = [RunStats("inline" if executor == "inline" else "threads", num_workers) for _ in names]
    answers = (
        _in_turn(machines, feeds, clock)
        if executor == "inline"
        else many_threads(machines, feeds, clock=clock, num_workers=num_workers)
    )
    return ManyRun(names, answers, feeds, machines, stats)


def _check_apart(circuit: Circuit) -> None:
    """Streams may share stages only where these keep nothing for themselves."""
    for stage in circuit.stages:
        if stage.hides_state and stage.init_buffers is None:
            raise CircuitError(
                f"stage {stage.name!r} keeps state outside of its buffers, which all streams would share; "
                "put it into buffers, or run each stream on a model of its own"
            )
        if stage.draws:
            raise CircuitError(
                f"stage {stage.name!r} draws random numbers, which streams side by side would take from each other; "
                "put the model into eval() before the cut, or run each stream by itself"
            )


def _in_turn(machines: list[Machine], feeds: list[Feed], clock: Clock) -> Generator[tuple[int, Output]]:
    """One thread: a frame of each stream in turn, until all have ended."""
    modes = caller_modes()
    rows = {n: inline(machine, feed, clock=clock) for n, (machine, feed) in enumerate(zip(machines, feeds))}
    while rows:
        for number, row in list(rows.items()):
            before = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                with modes.here():
                    output = next(row, None)
            finally:
                torch.set_num_threads(before)
            if output is None:
                del rows[number]
                continue
            yield number, output
