"""A standing pool of threads that fire cells as soon as they are ready: stages in parallel, each on another frame.

One lock guards which cells are ready; the work itself happens outside of it. A worker that has fired a cell takes
the next ready one itself, so a frame is handed from stage to stage without a queue between. Of several ready cells
the one with the oldest frame goes first. No more frames are let in than the circuit's registers hold in a tick, and
on a live source no more than full speed needs (``in_flight``).
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch

from sidestream.circuit.ages import lags_of
from sidestream.circuit.stage import SOURCE
from sidestream.clock import Clock
from sidestream.engine.executors.in_flight import LiveLimit, limit_in_flight
from sidestream.engine.feed import Feed, Tick
from sidestream.engine.modes import caller_modes
from sidestream.engine.tick import Cell, Machine
from sidestream.intra_op import use_one_thread
from sidestream.types import Output

STOP_GRACE_SECONDS = 1.0
"""How long a stopped run waits for a source that is stuck before it ends without it."""


def threads(
    machine: Machine, feed: Feed, *, clock: Clock, num_workers: int, max_in_flight: int | None = None
) -> Iterator[Output]:
    """Answers in order, equal to ``inline``'s to the bit.

    ``max_in_flight``: frames inside at once; at most the circuit's latency in ticks + 1 (default: that, but no more
    than ``num_workers`` + 1, since more frames than workers only wait; on a live source no more than ``num_workers``,
    and than full speed needs by the times that the stages take).
    """
    pool = _Pool(machine, feed, clock, _limit(machine, feed, num_workers, max_in_flight))
    return _answers(pool, feed, num_workers)


def _answers(pool: _Pool, feed: Feed, num_workers: int) -> Iterator[Output]:
    pool.start(num_workers)
    try:
        yield from drained_on_interrupt(pool.next_answer, feed)
    finally:
        pool.shut_down()


def drained_on_interrupt(next_answer: Callable[[], Output | None], feed: Feed) -> Iterator[Output]:
    """Answers until there are no more. Ctrl-C while waiting for one ends the feed; when all that was in flight is
    answered, KeyboardInterrupt is raised. A second Ctrl-C does not wait."""
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            output = next_answer()
        except KeyboardInterrupt as error:
            if interrupt is not None:
                raise
            interrupt = error
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


class _Pool:
    def __init__(self, machine: Machine, feed: Feed, clock: Clock, limit: int | LiveLimit) -> None:
        self.machine, self.feed, self.clock = machine, feed, clock
        self.live = limit if isinstance(limit, LiveLimit) else None
        self.most = limit.most if isinstance(limit, LiveLimit) else limit
        self.lock = threading.Lock()
        self.work = threading.Condition(self.lock)  # a cell became ready
        self.room = threading.Condition(self.lock)  # a frame left, another may come in
        self.done = threading.Condition(self.lock)  # an answer was made, or the run ended
        self.ready: list[tuple[int, int]] = []  # (frame it works on, -number): oldest frame first, then deepest
        self.queued: set[int] = set()  # cells that are ready or at work
        self.num_idle = 0
        self.num_in_flight = 0
        self.answers: deque[Output] = deque()
        self.has_fed_end = False
        self.asked_feed_at: float | None = None  # since when the feed is being asked for its next tick
        self.is_closed = False
        self.failure: BaseException | None = None
        self.lags = lags_of(machine.circuit)
        self.readers = _readers(machine)
        self.reads_sink = {w.source for w in machine.circuit.wires_into(machine.circuit.sink)}
        self.threads: list[threading.Thread] = []
        self.modes = caller_modes()
        self.intra_op_threads = torch.get_num_threads()

    @property
    def limit(self) -> int:
        """Frames that may be inside at once."""
        return self.most if self.live is None else self.live.now

    def start(self, num_workers: int) -> None:
        with self.lock:
            self._queue(range(1, len(self.machine.cells) + 1))
        targets = [self._run_feed] + [self._run_worker] * num_workers
        self.threads = [
            threading.Thread(target=target, daemon=True, name=f"sidestream-{n}") for n, target in enumerate(targets)
        ]
        for thread in self.threads:
            thread.start()

    def next_answer(self) -> Output | None:
        """The next answer, waiting for it; None when all are out. Raises what a stage or the source raised."""
        with self.lock:
            while True:
                if self.answers:
                    output = self.answers.popleft()
                    self.room.notify()
                    return output
                if self.failure is not None:
                    raise self.failure
                if self.machine.is_finished:
                    return None
                if self.feed.is_stopped and self._is_feed_stuck():
                    self._end_feed()
                self.done.wait(timeout=0.5)  # a stop from outside is seen within this time

    def _is_feed_stuck(self) -> bool:
        """The run was stopped, but the source neither brings a frame nor ends."""
        asked_at = self.asked_feed_at
        return not self.has_fed_end and asked_at is not None and time.monotonic() - asked_at > STOP_GRACE_SECONDS

    def _end_feed(self) -> None:
        self.has_fed_end = True
        self.machine.end()
        self._queue(self.readers[SOURCE])
        self._collect()
        self.work.notify_all()

    def shut_down(self) -> None:
        with self.lock:
            self.is_closed = True
            for condition in (self.work, self.room, self.done):
                condition.notify_all()
        for thread in self.threads[1:]:
            thread.join()
        self.threads[0].join(timeout=STOP_GRACE_SECONDS)  # the feed may be stuck in a source
        torch.set_num_threads(self.intra_op_threads)  # what a worker sets would be the default of later threads

    def _run_feed(self) -> None:
        use_one_thread()
        with self.modes.here():
            self._feed_on()

    def _feed_on(self) -> None:
        try:
            while self.feed.may_read_ahead or self._wait_for_room():
                tick = self._next_tick()
                if self.feed.may_read_ahead and not self._wait_for_room():
                    return
                with self.lock:
                    if self.has_fed_end:  # given up while it was stuck
                        return
                    if tick is None:
                        self._end_feed()
                        return
                    self.num_in_flight += tick[1] is not None
                    self.machine.feed(*tick)
                    self._queue(self.readers[SOURCE])
                    self._collect()
                    self.work.notify(min(self.num_idle, len(self.ready)))
        except BaseException as error:
            self._fail(error)

    def _next_tick(self) -> Tick | None:
        self.asked_feed_at = time.monotonic()
        try:
            return next(self.feed, None)
        finally:
            self.asked_feed_at = None

    def _wait_for_room(self) -> bool:
        """Wait until a frame may come in: enough answered, and the reader of the answers keeps up."""
        with self.lock:
            while self.num_in_flight >= self.limit or len(self.answers) >= self.most + 1:
                if self.is_closed:
                    return False
                self.room.wait()
            return not self.is_closed

    def _run_worker(self) -> None:
        use_one_thread()
        with self.modes.here():
            self._work_on()

    def _work_on(self) -> None:
        cell: Cell | None = None
        try:
            spent = 0.0
            while (cell := self._next_cell(cell, spent)) is not None:
                began = time.perf_counter()
                self.machine.fire(cell)
                spent = time.perf_counter() - began
        except BaseException as error:
            self._fail(error)

    def _next_cell(self, fired: Cell | None, spent_seconds: float) -> Cell | None:
        """Book what the fired cell has made ready, and take the next cell to fire; None when the run is over."""
        with self.lock:
            if fired is not None:
                if self.live is not None and self.live.book(fired, spent_seconds):
                    self.room.notify()
                self.queued.discard(fired.number)
                self._queue((fired.number, *self.readers[fired.number]))
                if fired.number in self.reads_sink:
                    self._collect()
                if self.machine.is_finished:
                    self.done.notify()
                if (num_others := len(self.ready) - 1) > 0 and self.num_idle:
                    self.work.notify(min(self.num_idle, num_others))
            while not self.ready:
                if self.is_closed:
                    return None
                self.num_idle += 1
                self.work.wait()
                self.num_idle -= 1
            if self.is_closed:
                return None
            return self.machine.cells[-heapq.heappop(self.ready)[1] - 1]

    def _queue(self, numbers: tuple[int, ...] | range) -> None:
        for number in numbers:
            cell = self.machine.cells[number - 1]
            if number not in self.queued and cell.is_ready:
                self.queued.add(number)
                heapq.heappush(self.ready, (cell.tick - self.lags[number], -number))

    def _collect(self) -> None:
        while self.machine.can_collect:
            has_left, output = self.machine.collect(self.clock.now())
            self.num_in_flight -= has_left
            if output is not None:
                self.answers.append(output)
            self.room.notify()
            self.done.notify()

    def _fail(self, error: BaseException) -> None:
        with self.lock:
            self.failure = self.failure or error
            self.is_closed = True
            for condition in (self.work, self.room, self.done):
                condition.notify_all()


def _readers(machine: Machine) -> list[tuple[int, ...]]:
    """For the source and every stage, the stages that its wires (and lines back) lead to."""
    circuit = machine.circuit
    readers: list[set[int]] = [set() for _ in range(circuit.num_stages + 1)]
    for wire in circuit.wires:
        if wire.target != circuit.sink:
            readers[wire.source].add(wire.target)
    for back in machine.rule.lines_back(circuit):
        readers[back.source].add(back.target)
    inputless = {n for n in range(1, circuit.num_stages + 1) if not circuit.wires_into(n)}
    readers[SOURCE] |= inputless
    return [tuple(sorted(r)) for r in readers]
