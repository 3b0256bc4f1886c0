"""The whole machine: cells joined by wires, and what happens when one of them fires.

Every wire is a first-in first-out line. A wire with delay d starts with d tokens in it, so the k-th value that a
stage reads from it is the one that was written d ticks earlier: that is all a delay is. A cell (one stage with its
state) may fire when each of its lines holds a value: it takes one from each, works, and puts one on each line that
leaves it. Which cell fires first makes no difference to any value (a Kahn process network), so an executor is free
to fire cells from many threads as soon as they are ready; nothing waits for a tick to end.

    frames -> feed() ->  ||lines||  -> fire(1) -> ||lines|| -> fire(2) ... -> ||lines|| -> collect() -> answers

Under a training rule lines of one token run back, for cotangents: against every wire between stages, or as the rule
says. They are more lines of the same network, with the same consequence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch.utils import _pytree as pytree

from sidestream.circuit.ages import lags_of, latency_ticks, look_ahead_ticks
from sidestream.circuit.stage import NOTHING, SOURCE, Stage, State
from sidestream.circuit.wire import Circuit, Wire
from sidestream.types import Frame, Output


class Message(NamedTuple):
    """A value on a wire, with the oldest and newest frame that had a part in it."""

    value: Any
    oldest: int | None = None
    newest: int | None = None
    is_warm_up: bool = False


SILENCE = Message(NOTHING)
END = Message("end of the stream")
"""Follows the last tick on every line: who reads it finishes and passes it on."""
Line = deque[Message]


def _initial(wire: Wire) -> Message:
    return SILENCE if wire.initial is None else Message(wire.initial, is_warm_up=True)


class Fed(NamedTuple):
    """What the machine remembers of a frame until it is answered."""

    frame_index: int
    pts_seconds: float
    arrived_at_seconds: float
    frame: Frame | None


@dataclass(slots=True)
class Cell:
    """A stage at work: its lines in, its lines out, its state and its own count of ticks."""

    number: int
    stage: Stage
    inbox: list[Line]
    outbox: list[list[Line]]
    period: int
    phase: int
    state: State = None
    lag: int = 0
    tick: int = 0
    has_ended: bool = False
    held: Sequence[Message] = ()
    busy_seconds: float = 0.0
    fed_back: dict[int, Message] = field(default_factory=dict)
    """Per feedback input what it brought last: it holds that while its stage writes nothing."""
    memory: Any = None
    """What a training rule keeps for the cell from one tick to the next."""

    @property
    def is_ready(self) -> bool:
        return not self.has_ended and all(self.inbox)


class LineBack(NamedTuple):
    """A line of one tick that brings stage ``target`` what stage ``source`` sends back for its input ``input``."""

    source: int
    input: int
    target: int


def against_wires(circuit: Circuit) -> list[LineBack]:
    """One line back against every wire between stages; each stage gets its own in the order of ``wires_from``."""
    numbers = range(1, circuit.num_stages + 1)
    return [LineBack(w.target, w.input, number) for number in numbers for w in circuit.wires_from(number)]


class Rule(Protocol):
    """What one cell does in one tick: messages in (one per input), messages out (one per output).

    Where ``goes_back``, the messages in then end with one per line back that leads to the cell, in the order of
    ``lines_back``, those out with one per input.
    """

    goes_back: bool

    def lines_back(self, circuit: Circuit) -> Sequence[LineBack]: ...

    def fire(self, cell: Cell, messages: Sequence[Message]) -> Sequence[Message]: ...

    def finish(self, cell: Cell) -> Sequence[Sequence[Message]]:
        """What the cell still owes at the end of the stream: rows of messages, one per output."""
        ...


@dataclass(slots=True)
class Machine:
    """A circuit at work under a rule. Not thread-safe by itself: one cell must not fire twice at once."""

    circuit: Circuit
    rule: Rule
    cells: list[Cell] = field(init=False)
    latency: int = field(init=False)
    _source: list[list[Line]] = field(init=False)
    _sink: list[Line] = field(init=False)
    _fed: deque[Fed] = field(init=False, default_factory=deque)
    _tick: int = field(init=False, default=0)
    has_ended: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        K = self.circuit.num_stages
        counts = [self.circuit.in_spec.num_leaves] + [s.num_outputs for s in self.circuit.stages]
        outboxes: list[list[list[Line]]] = [[[] for _ in range(n)] for n in counts]
        inboxes: list[list[Line]] = [[] for _ in range(K + 2)]
        for number in range(1, K + 2):
            for wire in self.circuit.wires_into(number):
                line: Line = deque([_initial(wire)] * wire.delay)
                inboxes[number].append(line)
                outboxes[wire.source][wire.output].append(line)
        self._source = outboxes[SOURCE]
        self.latency = latency_ticks(self.circuit) + look_ahead_ticks(self.circuit)
        for number in range(1, K + 1):  # a stage that reads nothing still ticks with the source
            if not inboxes[number]:
                inboxes[number].append(deque([SILENCE] * self.latency))
                self._source[0].append(inboxes[number][0])
        if self.rule.goes_back:
            self._add_lines_back(inboxes, outboxes)
        self._sink = inboxes[K + 1]
        self.cells = [self._cell(n, inboxes[n], outboxes[n]) for n in range(1, K + 1)]

    def _add_lines_back(self, inboxes: list[list[Line]], outboxes: list[list[list[Line]]]) -> None:
        stages = self.circuit.stages
        for number, stage in enumerate(stages, start=1):
            outboxes[number] += [[] for _ in range(stage.num_inputs)]
        for back in self.rule.lines_back(self.circuit):
            line: Line = deque([SILENCE])
            inboxes[back.target].append(line)
            outboxes[back.source][stages[back.source - 1].num_outputs + back.input].append(line)

    def _cell(self, number: int, inbox: list[Line], outbox: list[list[Line]]) -> Cell:
        stage = self.circuit.stages[number - 1]
        back = {w.input: _initial(w) for w in self.circuit.wires_into(number) if w.is_feedback}
        period, phase = self.circuit.periods[number - 1], self.circuit.phases[number - 1]
        state = stage.begin(trains=self.rule.goes_back)
        lag = lags_of(self.circuit)[number]
        return Cell(number, stage, inbox, outbox, period, phase, state, lag, fed_back=back)

    def feed(self, leaves: Sequence[Any], fed: Fed | None) -> None:
        """Start a tick: one value per leaf of the model's input; ``fed`` is None in a tick that repeats a frame."""
        index = fed.frame_index if fed else None
        for leaf, lines in zip(leaves, self._source, strict=True):
            for line in lines:
                line.append(Message(leaf, index, index))
        if fed is not None:
            self._fed.append(fed)

    def fire(self, cell: Cell) -> None:
        """Let one ready cell do its work of one tick."""
        messages = [line.popleft() for line in cell.inbox]
        if any(m is END for m in messages):
            self._finish(cell)
            return
        for n, held in cell.fed_back.items():
            messages[n] = cell.fed_back[n] = held if messages[n].value is NOTHING else messages[n]
        self._write(cell, self.rule.fire(cell, messages))

    @staticmethod
    def _write(cell: Cell, messages: Sequence[Message]) -> None:
        for lines, message in zip(cell.outbox, messages, strict=True):
            for line in lines:
                line.append(message)
        cell.tick += 1

    def _finish(self, cell: Cell) -> None:
        """What the cell owes, each in the tick of the frame it belongs to, then the end."""
        num_lines = len(cell.outbox)
        for messages in self.rule.finish(cell):
            while (frame := cell.tick - cell.lag - cell.stage.delay_ticks) < 0 or frame % cell.stage.period_ticks:
                self._write(cell, (SILENCE,) * num_lines)
            self._write(cell, messages)
        self._write(cell, (END,) * num_lines)
        cell.has_ended = True

    def end(self) -> None:
        """The stream has ended: no more frames will be fed."""
        for lines in self._source:
            for line in lines:
                line.append(END)

    @property
    def is_finished(self) -> bool:
        """The end has come out at the sink; in training also at every stage, which may be later."""
        return self.has_ended and (not self.rule.goes_back or all(cell.has_ended for cell in self.cells))

    @property
    def can_collect(self) -> bool:
        return not self.has_ended and all(self._sink)

    def collect(self, now_seconds: float) -> tuple[bool, Output | None]:
        """End a tick at the sink: whether it ends the wait of some frame, and the answer if there is one.

        Sets ``has_ended`` when the end of the stream has come through.
        """
        messages = [line.popleft() for line in self._sink]
        if any(m is END for m in messages):
            self.has_ended = True
            return False, None
        tick, self._tick = self._tick, self._tick + 1
        if tick < self.latency or not self._fed:
            return False, None
        fed = self._fed.popleft()
        if any(m.value is NOTHING for m in messages):
            return True, None
        oldest = min((m.oldest for m in messages if m.oldest is not None), default=fed.frame_index)
        newest = max((m.newest for m in messages if m.newest is not None), default=fed.frame_index)
        return True, Output(
            value=pytree.tree_unflatten([m.value for m in messages], self.circuit.out_spec),
            frame_index=fed.frame_index,
            oldest_frame_index=oldest,
            newest_frame_index=newest,
            pts_seconds=fed.pts_seconds,
            tick=tick,
            age_ticks=self.latency,
            is_warm_up=any(m.is_warm_up for m in messages),
            arrived_at_seconds=fed.arrived_at_seconds,
            made_at_seconds=now_seconds,
            frame=fed.frame,
        )
