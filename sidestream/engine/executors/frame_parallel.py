"""The whole model on several frames at once, one thread each: the rival that every pipeline must be held against.

Only for circuits whose answers depend on one frame: no state, no feedback, no mixed ages, no slow clocks.
Answers come out in order. The latency of an answer is the whole model's time on one thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from sidestream.circuit.ages import mixes_ages
from sidestream.circuit.wire import Circuit
from sidestream.clock import Clock
from sidestream.engine.executors.lane import STOP_GRACE_SECONDS
from sidestream.engine.executors.threads import drained_on_interrupt
from sidestream.engine.feed import Feed
from sidestream.engine.modes import caller_modes
from sidestream.engine.tick import Fed, Machine, Rule
from sidestream.errors import CircuitError
from sidestream.intra_op import use_one_thread
from sidestream.types import Output


def why_not_frame_parallel(circuit: Circuit) -> str | None:
    """Why a circuit cannot run frame-parallel; None when it can."""
    if circuit.is_stateful:
        return "it has stages with state, so each frame needs the one before"
    if circuit.has_feedback:
        return "it feeds answers back"
    if mixes_ages(circuit):
        return f"its {circuit.wiring} wiring mixes frames of different ages"
    if max(circuit.periods) > 1:
        return "some of its stages do not compute on every frame"
    return None


def frame_parallel(
    circuit: Circuit, rule: Rule, feed: Feed, *, clock: Clock, num_workers: int
) -> tuple[list[Machine], Iterator[Output]]:
    """One machine per worker (for their timings), and the answers in order, equal to ``inline``'s to the bit."""
    if (reason := why_not_frame_parallel(circuit)) is not None:
        raise CircuitError(f"this circuit cannot run frame-parallel: {reason}; use the executor 'threads'")
    row = undelayed(circuit)
    first = [row] + [row.replace(stages=tuple(s.twin() for s in row.stages)) for _ in range(num_workers - 1)]
    machines = [Machine(r, rule) for r in first]
    return machines, _answers(_Crew(feed, clock, limit=2 * num_workers), machines)


def _answers(crew: _Crew, machines: list[Machine]) -> Iterator[Output]:
    intra_op_threads = torch.get_num_threads()
    threads = [threading.Thread(target=crew.run_worker, args=(m,), daemon=True) for m in machines]
    for thread in threads:
        thread.start()
    try:
        yield from drained_on_interrupt(crew.next_answer, crew.feed)
    finally:
        crew.close()
        give_up_at = time.monotonic() + STOP_GRACE_SECONDS
        for thread in threads:  # one may be stuck in a source, and the others behind it
            thread.join(timeout=max(0.0, give_up_at - time.monotonic()))
        torch.set_num_threads(intra_op_threads)  # what a worker sets would be the default of later threads


class _Crew:
    """Workers that each take the next frame, run it through all stages, and put the answer in its place."""

    def __init__(self, feed: Feed, clock: Clock, limit: int) -> None:
        self.feed, self.clock, self.limit = feed, clock, limit
        self.taking = threading.Lock()  # held while the next frame is taken
        self.changed = threading.Condition()
        self.answers: dict[int, Output | None] = {}  # by position; None where a stage swallowed the frame
        self.num_taken = self.num_ready = self.num_given = 0  # ready: with all answers before it
        self.has_ended = self.is_closed = False
        self.failure: BaseException | None = None
        self.modes = caller_modes()

    def next_answer(self) -> Output | None:
        """The next answer in order, waiting for it; None when all are out."""
        with self.changed:
            while True:
                while self.num_given in self.answers:
                    output = self.answers.pop(self.num_given)
                    self.num_given += 1
                    self.changed.notify_all()
                    if output is not None:
                        return output
                if self.failure is not None:
                    raise self.failure
                if self.num_given == self.num_taken and (self.has_ended or self._is_stuck()):
                    return None
                self.changed.wait(timeout=0.5)

    def _is_stuck(self) -> bool:
        """Stopped, nothing in flight, and the source brings no frame any more."""
        return self.feed.is_stopped and not self.changed.wait(timeout=STOP_GRACE_SECONDS)

    def run_worker(self, machine: Machine) -> None:
        use_one_thread()
        with self.modes.here():
            self._work_on(machine)

    def _work_on(self, machine: Machine) -> None:
        try:
            while (tick := self._take()) is not None:
                position, leaves, fed = tick
                machine.feed(leaves, fed)
                for cell in machine.cells:
                    machine.fire(cell)
                self._put(position, machine.collect(self.clock.now())[1])
        except BaseException as error:
            with self.changed:
                self.failure = self.failure or error
                self.is_closed = True
                self.changed.notify_all()

    def _take(self) -> tuple[int, list[Any], Fed | None] | None:
        with self.taking:
            with self.changed:
                while self.num_taken - self.num_given >= self.limit and not self.is_closed:
                    self.changed.wait()
                if self.is_closed or self.has_ended:
                    return None
            tick = next(self.feed, None)
            with self.changed:
                if tick is None:
                    self.has_ended = True
                    self.changed.notify_all()
                    return None
                position, self.num_taken = self.num_taken, self.num_taken + 1
            return position, *tick

    def _put(self, position: int, output: Output | None) -> None:
        with self.changed:
            self.answers[position] = None if output is None else replace(output, tick=position)
            while self.num_ready in self.answers:  # an answer counts as made when it can be given: in order
                ready = self.answers[self.num_ready]
                if ready is not None:
                    self.answers[self.num_ready] = replace(ready, made_at_seconds=self.clock.now())
                self.num_ready += 1
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()


def undelayed(circuit: Circuit) -> Circuit:
    """The same function with no delays, where delays only shift it in time; else the circuit itself."""
    if mixes_ages(circuit) or circuit.has_feedback or max(circuit.periods) > 1:
        return circuit
    return circuit.replace(wires=tuple(replace(w, delay=0) for w in circuit.wires), wiring="sequential")
