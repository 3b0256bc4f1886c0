"""When a circuit on W workers takes up which frame and answers it: the engine's own lines and rules, on simulated time.

``schedule`` knows a device and a row of stages; this knows every circuit, with skips, groups, feedback and clocks. A
``Machine`` whose stages do nothing but last for a while is driven as ``executors.threads`` drives it, so a stage works
on tick n when

- each of its wires holds its value of tick n - delay, and its own tick n - 1 is over. A stage that does not read the
  frame waits for no frame: it may be ticks ahead of the camera as far as its wires allow, and so may an answer;
- a worker is free. Of several ready stages the one with the oldest frame goes first, of these the deepest.

Tick n takes up the newest frame that has come when there is room for it (``LiveLimit``), or the
next one when none has come since. A frame is inside until its tick of being answered, tick n + latency, is over.

As in ``schedule`` times are in frames, and of any kind of number. The clip ends with its last frame's period.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sidestream.circuit.ages import latency_ticks, look_ahead_ticks, mixes_ages
from sidestream.circuit.stage import NOTHING, Stage, State, Values
from sidestream.circuit.wire import Circuit
from sidestream.engine import run
from sidestream.engine.executors.in_flight import LiveLimit
from sidestream.engine.rules.forward import Forward
from sidestream.engine.tick import END, Cell, Fed, Machine
from sidestream.errors import InputError
from sidestream.evals.streaming.live import JudgedFrame, ToValue
from sidestream.evals.streaming.log import Answer
from sidestream.evals.streaming.schedule import Time, Work, newest_frame
from sidestream.evals.streaming.values import Value
from sidestream.types import Frame

Intake = Literal["room", "paced"]
"""When a frame may be taken up: when fewer are inside than the engine lets in ("room"), or when the slowest stage would
be done with the one before, as in ``schedule.pipeline`` ("paced"): then none waits inside for a slow stage."""


@dataclass(frozen=True, slots=True)
class TickAnswer:
    """What comes out in one tick."""

    tick: int
    frame_index: int
    """The frame that it answers."""
    newest_frame_index: int
    """The newest one that had a part in it."""
    ready: Time
    is_warm_up: bool = False


@dataclass(frozen=True)
class Dataflow:
    """A schedule of a circuit on a clip."""

    frames: tuple[int, ...]
    """The frame that each tick took up, and ``taken``: when."""
    taken: tuple[Time, ...]
    answers: tuple[TickAnswer, ...]
    stage_busy: tuple[Time, ...]
    worker_busy: tuple[Time, ...]
    end: Time
    """When the last stage had done its last tick."""

    @property
    def works(self) -> list[Work]:
        """Each answer as that of the frame which it answers, as the schedules of devices give it."""
        taken = dict(zip(self.frames, self.taken, strict=True))
        return [Work(a.frame_index, taken[a.frame_index], a.ready) for a in self.answers if not a.is_warm_up]

    def busy_shares(self, of: Sequence[Time]) -> tuple[float, ...]:
        """Of ``stage_busy`` or ``worker_busy``: as shares of the time from the first frame to the end."""
        span = self.end - self.taken[0] if self.taken else 0
        return tuple(float(busy / span) if span else 0.0 for busy in of)


def dataflow(
    num_frames: int,
    circuit: Circuit,
    rows: Iterable[Sequence[Time]],
    *,
    num_workers: int | None = None,
    max_in_flight: int | None = None,
    intake: Intake = "room",
) -> Dataflow:
    """The schedule of ``circuit`` on a clip.

    Args:
        rows: runtimes of the K stages in frames, a row for each frame that is taken up; as many as are needed are
            taken. A stage takes the row of the frame that it is working on, the oldest that reaches it.
        num_workers: threads that share the stages; None: one for each stage.
        max_in_flight: as of ``executors.threads``.

    Raises:
        InputError: layers that look ahead or swallow frames, rows that end or do not fit, no worker.
    """
    if look_ahead_ticks(circuit) or any(s.period_ticks > 1 or s.delay_ticks for s in circuit.stages):
        raise InputError("layers that look ahead or swallow frames cannot be scheduled; give a circuit without")
    if num_workers is not None and num_workers < 1:
        raise InputError(f"{num_workers = }; give 1 or more, or None for one per stage")
    workers = min(num_workers or circuit.num_stages, circuit.num_stages)
    return _Simulation(num_frames, circuit, iter(rows), workers, max_in_flight, intake).run()


def values_of_ticks(
    circuit: Circuit, frames: Sequence[Frame], taken: Iterable[int], *, answer: ToValue, prepare: Any = None
) -> dict[int, Value]:
    """By tick what the circuit answers when it is fed exactly the frames ``taken``, on one thread."""
    fed = [replace(frames[n], index=n) for n in taken]
    outputs = run(circuit, fed, executor="inline", prepare=prepare)
    return {out.tick: answer(out) for out in outputs if not out.is_warm_up}


def answers_of(
    flow: Dataflow, values: Mapping[int, Value], *, frame_rate: float, clip: str, judged_frame: JudgedFrame = "answered"
) -> list[Answer]:
    """The log of a schedule: ``values`` by tick, each for the frame that it answers, or the one taken up in its tick.

    A prediction that is made before the frame of its tick is taken up is ready when that is (see ``JudgedFrame``).
    """
    found = []
    for a in flow.answers:
        is_newest = judged_frame == "newest"
        if a.is_warm_up or (is_newest and a.tick >= len(flow.frames)):
            continue
        frame = flow.frames[a.tick] if is_newest else a.frame_index
        ready = max(a.ready, flow.taken[a.tick]) if is_newest else a.ready
        due = frame / frame_rate
        found.append(Answer(clip, frame, due, due, max(due, float(ready) / frame_rate), values[a.tick]))
    return found


def _silent(num_outputs: int) -> Callable[[Values, State], tuple[Values, State]]:
    return lambda inputs, state: ((None,) * num_outputs, None)


def _without_work(stage: Stage) -> Stage:
    step = _silent(stage.num_outputs)
    return replace(stage, step=step, init_state=None, init_buffers=None, finish=None, copy=None, hides_state=False)


@dataclass
class _Simulation:
    """Events in order of time: a stage is done, or a frame comes."""

    num_frames: int
    circuit: Circuit
    draws: Iterator[Sequence[Time]]
    num_workers: int
    max_in_flight: int | None
    intake: Intake
    now: Time = 0
    rows: list[Sequence[Time]] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    taken: list[Time] = field(default_factory=list)
    answers: list[TickAnswer] = field(default_factory=list)
    num_in_flight: int = 0
    has_fed_end: bool = False
    events: list[tuple[Time, int, int]] = field(default_factory=list)
    """(time, stage, worker); stage 0 is the camera."""
    ready: list[tuple[int, int]] = field(default_factory=list)
    queued: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        blank = self.circuit.replace(stages=tuple(_without_work(s) for s in self.circuit.stages))
        self.machine = Machine(blank, Forward())
        self.limit = LiveLimit(self.machine, self.num_workers, self.max_in_flight)
        self.num_drain = latency_ticks(self.circuit) if mixes_ages(self.circuit) else 0
        self.idle = list(range(self.num_workers))
        self.runtimes: dict[int, Time] = {}
        self.stage_busy: list[Time] = [0] * self.circuit.num_stages
        self.worker_busy: list[Time] = [0] * self.num_workers

    def run(self) -> Dataflow:
        while True:
            while self._collect() or self._feed():
                pass
            self._queue()
            self._start_work()
            if self.machine.is_finished:
                break
            assert self.events, "the machine is stuck"  # it keeps moving for every circuit that the engine runs
            self.now = self.events[0][0]
            while self.events and self.events[0][0] == self.now:
                self._happen(*heapq.heappop(self.events)[1:])
        busy = tuple(self.stage_busy), tuple(self.worker_busy)
        return Dataflow(tuple(self.frames), tuple(self.taken), tuple(self.answers), *busy, self.now)

    def _happen(self, number: int, worker: int) -> None:
        if number:
            cell = self.machine.cells[number - 1]
            self.machine.fire(cell)
            self.limit.book(cell, float(self.runtimes[number]))
            self.queued.discard(number)
            heapq.heappush(self.idle, worker)

    def _queue(self) -> None:
        for cell in self.machine.cells:
            if cell.number not in self.queued and cell.is_ready:
                self.queued.add(cell.number)
                heapq.heappush(self.ready, (cell.tick - cell.lag, -cell.number))

    def _start_work(self) -> None:
        while self.ready and self.idle:
            cell = self.machine.cells[-heapq.heappop(self.ready)[1] - 1]
            worker, runtime = heapq.heappop(self.idle), self._runtime(cell)
            self.runtimes[cell.number] = runtime
            self.stage_busy[cell.number - 1] += runtime
            self.worker_busy[worker] += runtime
            heapq.heappush(self.events, (self.now + runtime, cell.number, worker))

    def _runtime(self, cell: Cell) -> Time:
        """Nothing where there is nothing to do: no value yet, none any more, or not the stage's tick."""
        heads = [line[0] for line in cell.inbox]
        values = heads[: cell.stage.num_inputs]
        is_silent = any(m.value is NOTHING and n not in cell.fed_back for n, m in enumerate(values))
        if is_silent or any(m is END for m in heads) or cell.tick % cell.period != cell.phase:
            return 0
        return self._row(max(0, cell.tick - cell.lag))[cell.number - 1]

    def _row(self, number: int) -> Sequence[Time]:
        while len(self.rows) <= number:
            row = next(self.draws, None)
            if row is None or len(row) != self.circuit.num_stages or any(time < 0 for time in row):
                raise InputError(
                    f"row {len(self.rows)} of the runtimes is {row}; give {self.circuit.num_stages} times of 0 or more "
                    "in every row, without end (itertools.repeat, profile.draw_rows)"
                )
            self.rows.append(row)
        return self.rows[number]

    def _collect(self) -> bool:
        if not self.machine.can_collect:
            return False
        has_left, out = self.machine.collect(0.0)
        self.num_in_flight -= has_left
        if out is not None:
            newest = out.frame_index if out.newest_frame_index is None else out.newest_frame_index
            self.answers.append(TickAnswer(out.tick, out.frame_index, newest, self.now, out.is_warm_up))
        return True

    def _feed(self) -> bool:
        """Take up a frame if one has come and may come in; at the end of the clip what the engine feeds then."""
        if self.has_fed_end or (self.intake == "room" and self.num_in_flight >= self.limit.now):
            return False
        start = self.now
        if self.intake == "paced" and self.taken:
            start = max(start, self.taken[-1] + max(self._row(len(self.taken) - 1)))
        frame = newest_frame(start)
        if self.frames and frame <= self.frames[-1]:
            frame = self.frames[-1] + 1
        if frame >= self.num_frames:
            return self._feed_the_rest()
        if (start := max(start, frame)) > self.now:
            if (start, 0, 0) not in self.events:
                heapq.heappush(self.events, (start, 0, 0))
            return False
        self.frames.append(frame)
        self.taken.append(self.now)
        self.num_in_flight += 1
        self.machine.feed(self._leaves(), Fed(frame, 0.0, 0.0, None))
        return True

    def _feed_the_rest(self) -> bool:
        self.num_drain -= 1
        if self.num_drain >= 0 and self.frames:
            self.machine.feed(self._leaves(), None)
        else:
            self.has_fed_end = True
            self.machine.end()
        return True

    def _leaves(self) -> list[None]:
        return [None] * self.circuit.in_spec.num_leaves
