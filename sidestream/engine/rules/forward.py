"""The forward rule: a cell computes its stage on what its lines bring, and holds the result between its ticks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from sidestream.circuit.gate import GATE
from sidestream.circuit.stage import NOTHING, State, Values
from sidestream.circuit.wire import Circuit
from sidestream.engine.tick import SILENCE, Cell, LineBack, Message
from sidestream.errors import LayoutError, SidestreamError, StageError


class Forward:
    """Inference. Runs under ``torch.inference_mode``: answers cannot be used in autograd; clone them for that."""

    goes_back = False

    def lines_back(self, circuit: Circuit) -> Sequence[LineBack]:
        return ()

    def fire(self, cell: Cell, messages: Sequence[Message]) -> Sequence[Message]:
        if cell.tick % cell.period != cell.phase:
            return cell.held or (SILENCE,) * cell.stage.num_outputs
        messages = messages[: cell.stage.num_inputs]
        if any(m.value is NOTHING for m in messages):
            outputs: Sequence[Message] = (SILENCE,) * cell.stage.num_outputs
        else:
            outputs = self._work(cell, messages)
        if cell.period > 1:
            cell.held = outputs
        return outputs

    def finish(self, cell: Cell) -> Sequence[Sequence[Message]]:
        if cell.stage.finish is None:
            return []
        with naming(cell, frame_index=None), torch.inference_mode():
            return [[Message(value) for value in values] for values in cell.stage.finish(cell.state)]

    def _work(self, cell: Cell, messages: Sequence[Message]) -> Sequence[Message]:
        oldest = min((m.oldest for m in messages if m.oldest is not None), default=None)
        started = time.perf_counter()
        values, cell.state = run_stage(cell, tuple(m.value for m in messages), frame_index=oldest)
        cell.busy_seconds += time.perf_counter() - started
        newest = max((m.newest for m in messages if m.newest is not None), default=None)
        is_warm_up = any(_is_warm_up(m, n in cell.fed_back) for n, m in enumerate(messages))
        return [Message(value, oldest, newest, is_warm_up) for value in values]


def _is_warm_up(message: Message, is_feedback: bool) -> bool:
    """A fed-back value counts only while it is the wire's own initial value; else warm-up would never end."""
    return message.is_warm_up and (not is_feedback or message.newest is None)


def run_stage(cell: Cell, inputs: Values, *, frame_index: int | None) -> tuple[Values, State]:
    """One step of the stage; whatever goes wrong names the stage and the frame."""
    with naming(cell, frame_index=frame_index), torch.inference_mode():
        if not cell.stage.calls_modules:
            return cell.stage.step(inputs, cell.state)
        with GATE.calling():
            return cell.stage.step(inputs, cell.state)


@contextmanager
def naming(cell: Cell, *, frame_index: int | None) -> Iterator[None]:
    """Turns whatever goes wrong inside into a StageError that names the stage and the frame."""
    try:
        yield
    except SidestreamError as error:
        if type(error) is LayoutError:
            where = f"stage {cell.number} ({cell.stage.name}), frame {frame_index}"
            raise LayoutError(f"{where}: {error}") from error
        raise
    except Exception as error:
        when = "at the end of the stream" if frame_index is None else f"on frame {frame_index} (tick {cell.tick})"
        where = f"stage {cell.number} ({cell.stage.name}) failed {when}"
        raise StageError(f"{where}: {type(error).__name__}: {error}") from error
