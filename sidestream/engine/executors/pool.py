"""A standing pool of threads that fire cells as soon as they are ready: stages in parallel, each on another frame.

One lock guards which cells are ready; the work itself happens outside of it. A worker that has fired a cell takes
the next ready one itself, so a frame is handed from stage to stage without a queue between. Of several ready cells
the one with the oldest frame goes first.

A pool has one lane per stream: its machine, its feed, what is in flight. The stages of all lanes are the same, their
weights are there once; each lane has its own state and its own thread that waits for its source, so that a camera
that is slow, or gone, holds up nobody else.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Sequence

import torch

from sidestream.circuit.stage import SOURCE
from sidestream.clock import Clock
from sidestream.engine.executors.lane import STOP_GRACE_SECONDS, Lane
from sidestream.engine.feed import Tick
from sidestream.engine.modes import caller_modes
from sidestream.engine.tick import Cell
from sidestream.intra_op import use_one_thread
from sidestream.types import Output


class Pool:
    """Workers on the cells of all lanes."""

    def __init__(self, lanes: Sequence[Lane], clock: Clock) -> None:
        self.lanes, self.clock = list(lanes), clock
        for number, lane in enumerate(self.lanes):
            lane.number = number
        self.is_shared = len(self.lanes) > 1
        self.lock = threading.Lock()
        self.work = threading.Condition(self.lock)  # a cell became ready
        self.room = threading.Condition(self.lock)  # a frame left, another may come in
        self.done = threading.Condition(self.lock)  # an answer was made, or the run ended
        # (arrival of the frame it works on, place of that frame, -number, lane): oldest frame first, then deepest
        self.ready: list[tuple[float, int, int, int]] = []
        self.num_workers = self.num_idle = 0
        self.answers: deque[tuple[int, Output]] = deque()
        self.is_closed = False
        self.failure: BaseException | None = None
        self.feeders: list[threading.Thread] = []
        self.workers: list[threading.Thread] = []
        self.modes = caller_modes()
        self.intra_op_threads = torch.get_num_threads()

    def start(self, num_workers: int) -> None:
        """Start the workers, and a thread for each lane's source."""
        self.num_workers = num_workers
        with self.lock:
            for lane in self.lanes:
                self._queue(lane, range(1, len(lane.machine.cells) + 1))

        def thread(target: object, *args: object) -> threading.Thread:
            name = f"sidestream-{len(self.feeders) + len(self.workers)}"
            return threading.Thread(target=target, args=args, daemon=True, name=name)  # type: ignore[arg-type]

        for lane in self.lanes:
            self.feeders.append(thread(self._run_feed, lane))
        for _ in range(num_workers):
            self.workers.append(thread(self._run_worker))
        for started in (*self.feeders, *self.workers):
            started.start()

    def next_answer(self) -> tuple[int, Output] | None:
        """The next answer and its lane, waiting for it; None when all are out. Raises what a stage raised."""
        with self.lock:
            while True:
                if self.answers:
                    number, output = self.answers.popleft()
                    self.lanes[number].num_unread -= 1
                    self._make_room()
                    return number, output
                if self.failure is not None:
                    raise self.failure
                if all(lane.machine.is_finished for lane in self.lanes):
                    return None
                for lane in self.lanes:
                    if lane.is_stuck:
                        self._end_feed(lane)
                self.done.wait(timeout=0.5)  # a stop from outside is seen within this time

    def shut_down(self) -> None:
        """End all threads; what is in flight is lost."""
        with self.lock:
            self.is_closed = True
            for condition in (self.work, self.room, self.done):
                condition.notify_all()
        for worker in self.workers:
            worker.join()
        give_up_at = time.monotonic() + STOP_GRACE_SECONDS
        for feeder in self.feeders:  # one may be stuck in a source
            feeder.join(timeout=max(0.0, give_up_at - time.monotonic()))
        torch.set_num_threads(self.intra_op_threads)  # what a worker sets would be the default of later threads

    def _make_room(self) -> None:
        if self.is_shared:
            self.room.notify_all()
        else:
            self.room.notify()

    def _end_feed(self, lane: Lane) -> None:
        lane.has_fed_end = True
        lane.machine.end()
        self._queue(lane, lane.readers[SOURCE])
        self._collect(lane)
        self.work.notify_all()

    def _run_feed(self, lane: Lane) -> None:
        use_one_thread()
        with self.modes.here():
            self._feed_on(lane)

    def _feed_on(self, lane: Lane) -> None:
        feed = lane.feed
        try:
            while feed.may_read_ahead or self._wait_for_room(lane):
                tick = self._next_tick(lane)
                if feed.may_read_ahead and not self._wait_for_room(lane):
                    return
                with self.lock:
                    if lane.has_fed_end:  # given up while it was stuck
                        return
                    if tick is None:
                        self._end_feed(lane)
                        self.done.notify()
                        return
                    if tick[1] is not None:
                        lane.num_in_flight += 1
                        lane.arrivals.append(tick[1].arrived_at_seconds)
                    lane.machine.feed(*tick)
                    self._queue(lane, lane.readers[SOURCE])
                    self._collect(lane)
                    self.work.notify(min(self.num_idle, len(self.ready)))
        except BaseException as error:
            self._fail(error)

    @staticmethod
    def _next_tick(lane: Lane) -> Tick | None:
        lane.asked_feed_at = time.monotonic()
        try:
            return next(lane.feed, None)
        finally:
            lane.asked_feed_at = None

    def _wait_for_room(self, lane: Lane) -> bool:
        """Wait until a frame may come in: enough answered, and the reader of the answers keeps up."""
        with self.lock:
            while self._is_full(lane):
                if self.is_closed:
                    return False
                self.room.wait()
            return not self.is_closed

    def _is_full(self, lane: Lane) -> bool:
        """A lane may always work on one answer; on more where the others leave workers idle."""
        if lane.is_full or not self.is_shared:
            return lane.is_full
        return lane.num_ahead > 0 and sum([other.num_ahead for other in self.lanes]) >= self.num_workers

    def _run_worker(self) -> None:
        use_one_thread()
        with self.modes.here():
            self._work_on()

    def _work_on(self) -> None:
        fired: tuple[Lane, Cell] | None = None
        try:
            spent = 0.0
            while (fired := self._next_cell(fired, spent)) is not None:
                lane, cell = fired
                began = time.perf_counter()
                lane.machine.fire(cell)
                spent = time.perf_counter() - began
        except BaseException as error:
            self._fail(error)

    def _next_cell(self, fired: tuple[Lane, Cell] | None, spent_seconds: float) -> tuple[Lane, Cell] | None:
        """Book what the fired cell has made ready, and take the next cell to fire; None when the run is over."""
        with self.lock:
            if fired is not None:
                self._book(*fired, spent_seconds)
            while not self.ready:
                if self.is_closed:
                    return None
                self.num_idle += 1
                self.work.wait()
                self.num_idle -= 1
            if self.is_closed:
                return None
            *_, number, at = heapq.heappop(self.ready)
            lane = self.lanes[at]
            return lane, lane.machine.cells[-number - 1]

    def _book(self, lane: Lane, cell: Cell, spent_seconds: float) -> None:
        if lane.live is not None and lane.live.book(cell, spent_seconds):
            self._make_room()
        lane.queued.discard(cell.number)
        self._queue(lane, (cell.number, *lane.readers[cell.number]))
        if cell.number in lane.reads_sink:
            self._collect(lane)
        if lane.machine.is_finished:
            self.done.notify()
        if (num_others := len(self.ready) - 1) > 0 and self.num_idle:
            self.work.notify(min(self.num_idle, num_others))

    def _queue(self, lane: Lane, numbers: tuple[int, ...] | range) -> None:
        for number in numbers:
            cell = lane.machine.cells[number - 1]
            if number not in lane.queued and cell.is_ready:
                lane.queued.add(number)
                position = cell.tick - lane.lags[number]
                arrived = lane.arrival_of(position) if self.is_shared else 0.0
                heapq.heappush(self.ready, (arrived, position, -number, lane.number))

    def _collect(self, lane: Lane) -> None:
        while lane.machine.can_collect:
            has_left, output = lane.machine.collect(self.clock.now())
            if has_left:
                lane.num_in_flight -= 1
                lane.num_left += 1
                lane.arrivals.popleft()
            if output is not None:
                lane.num_unread += 1
                self.answers.append((lane.number, output))
            self._make_room()
            self.done.notify()

    def _fail(self, error: BaseException) -> None:
        with self.lock:
            self.failure = self.failure or error
            self.is_closed = True
            for condition in (self.work, self.room, self.done):
                condition.notify_all()
