"""Frames let in at once: on a live source as many as full speed needs, by the times that the stages really take."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.wire import Circuit
from sidestream.circuit.wiring import parallel, pipelined, with_periods
from sidestream.engine import run
from sidestream.engine.executors.in_flight import LiveLimit
from sidestream.engine.rules.forward import Forward
from sidestream.engine.rules.sideways import Sideways
from sidestream.engine.tick import Cell, Machine

MILLISECONDS = (2, 2, 40, 2, 2, 2)


class Sleeping(nn.Module):
    """Takes its time, and no core."""

    def __init__(self, milliseconds: float) -> None:
        super().__init__()
        self.seconds = milliseconds / 1e3

    def forward(self, x_BCHW: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return x_BCHW


class Camera:
    """Has a newer frame whenever it is asked; notes how many frames are inside by then."""

    def __init__(self, num_frames: int, *, wants_latency: bool) -> None:
        self.num_frames, self.wants_latency = num_frames, wants_latency
        self.num_answered = 0
        self.inside: list[int] = []

    def __iter__(self) -> Iterator[Tensor]:
        for n in range(self.num_frames):
            self.inside.append(n - self.num_answered)
            yield torch.full((1, 1, 1, 1), float(n))


def row(times: tuple[float, ...]) -> Circuit:
    return pipelined(stages_of([Sleeping(t) for t in times], torch.zeros(1, 1, 1, 1)))


def watched(camera: Camera, num_threads: int = 6, max_in_flight: int | None = None) -> list[int]:
    """Frames inside when a frame is taken, at full speed."""
    circuit = row((0.0,) * 6)  # cutting tries the stages out
    for stage, milliseconds in zip(circuit.stages, MILLISECONDS, strict=True):
        assert isinstance(stage.module, Sleeping)
        stage.module.seconds = milliseconds / 1e3
    found = []
    for output in run(circuit, camera, num_threads=num_threads, max_in_flight=max_in_flight):
        camera.num_answered += 1
        found.append(int(output.value))
    assert found == list(range(camera.num_frames))
    return camera.inside[20:-1]


def test_frames_do_not_queue_inside_of_a_live_pipeline() -> None:
    """All stages take 50 ms, the slowest 40: two frames keep it busy, and with six each would wait for 200 ms."""
    live = watched(Camera(45, wants_latency=True))
    assert statistics.median(live) <= 3  # a busy machine makes the short ones longer
    asked = watched(Camera(45, wants_latency=True), max_in_flight=6)
    recorded = watched(Camera(45, wants_latency=False))
    assert statistics.median(asked) >= 5
    assert statistics.median(recorded) >= 5


def test_a_frame_comes_in_as_soon_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for a second frame is made while the first is in the last stage, which waits for that."""
    taken = threading.Event()
    waited: list[bool] = []

    class Book(LiveLimit):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.now = 1

        def book(self, fired: Cell, seconds: float) -> bool:
            is_more = seconds > 0.05 and self.now == 1  # stage 2, at work on the first frame
            self.now = 2 if is_more else self.now
            return is_more

    class Waiting(nn.Module):
        def forward(self, x_BCHW: Tensor) -> Tensor:
            if is_begun:
                waited.append(taken.wait(timeout=20))
            return x_BCHW

    is_begun = False
    circuit = pipelined(stages_of([Sleeping(0), Sleeping(100), Waiting()], torch.zeros(1, 1, 1, 1)))
    is_begun = True

    class Camera:
        wants_latency = True

        def __iter__(self) -> Iterator[Tensor]:
            yield torch.zeros(1, 1, 1, 1)
            taken.set()
            yield torch.ones(1, 1, 1, 1)

    monkeypatch.setattr("sidestream.engine.executors.threads.LiveLimit", Book)
    assert [float(o.value) for o in run(circuit, Camera(), num_threads=3)] == [0.0, 1.0]
    assert waited == [True, True]


def test_a_trial_of_auto_lets_in_as_many_frames_as_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["sidestream.engine.run"]
    found: list[tuple[str, bool]] = []
    start = module._start  # type: ignore[attr-defined]

    def noted(circuit: Circuit, frames: Any, executor: str, options: Any) -> Any:
        found.append((executor, bool(getattr(frames, "wants_latency", False))))
        return start(circuit, frames, executor, options)

    monkeypatch.setattr(module, "_start", noted)
    for wants_latency in (True, False):
        found.clear()
        assert len(list(run(row((0.0, 0.0)), Camera(3, wants_latency=wants_latency), executor="auto"))) == 3
        assert len(found) >= 3  # trials, and the run itself
        assert {wants for _, wants in found} == {wants_latency}


def booked(circuit: Circuit, times: tuple[float, ...], num_workers: int, max_in_flight: int | None = None) -> LiveLimit:
    """After ten ticks in which every stage takes its time."""
    machine = Machine(circuit, Forward())
    limit = LiveLimit(machine, num_workers, max_in_flight)
    for cell in machine.cells:
        cell.tick = cell.lag + 1
        for n in range(10):
            limit.book(cell, times[cell.number - 1] * (100 if n == 4 else 1))  # one hiccup
    return limit


@pytest.mark.parametrize(
    ("times", "num_workers", "frames"),
    [
        ((1, 1, 1, 1), 4, 4),  # even: one per stage
        ((1, 1, 1, 1), 2, 2),  # one per worker
        ((1, 1, 6, 1), 4, 2),  # 9 / 6
        ((1, 1, 6, 1), 2, 2),  # two workers: every 6, not every 4.5
        ((3, 2, 3, 2), 4, 4),  # 10 / 3
        ((0, 0, 5, 0), 4, 1),
        ((0, 0, 0, 0), 4, 4),  # nothing is known
    ],
)
def test_as_many_as_full_speed_needs(times: tuple[float, ...], num_workers: int, frames: int) -> None:
    circuit = row((0.0,) * 4)
    assert booked(circuit, times, num_workers).now == frames
    assert booked(circuit, times, num_workers, max_in_flight=3).now == 3  # what was asked for
    assert booked(with_periods(circuit, (1, 1, 2, 2)), times, num_workers).now == num_workers


def test_frames_that_wait_for_a_layer_that_looks_ahead_come_on_top() -> None:
    """9 / 6 frames for full speed, and two that wait for the frames to come; once, not twice."""
    circuit = row((0.0,) * 4)
    last = replace(circuit.stages[-1], delay_ticks=2)
    limit = booked(circuit.replace(stages=(*circuit.stages[:-1], last)), (1, 1, 6, 1), 4)
    assert (limit.most, limit.now) == (6, 4)


def test_ticks_that_fill_the_pipeline_and_training_change_nothing() -> None:
    circuit = row((0.0,) * 4)
    machine = Machine(circuit, Forward())
    limit = LiveLimit(machine, 4, None)
    for cell in machine.cells:
        cell.tick = cell.lag  # has worked on nothing yet
        for _ in range(10):
            assert not limit.book(cell, 0.0 if cell.number != 3 else 1.0)
    assert limit.now == 4
    rule = Sideways(nn.functional.mse_loss)
    machine = Machine(rule.attach(circuit), rule)
    limit = LiveLimit(machine, 4, None)
    for cell in machine.cells:
        cell.tick = cell.lag + 1
        for _ in range(10):
            limit.book(cell, 1.0 if cell.number == 3 else 0.0)
    assert limit.now == machine.latency + 1 == 4


def test_more_room_is_said() -> None:
    circuit = row((0.0,) * 2)
    machine = Machine(circuit, Forward())
    limit = LiveLimit(machine, 2, None)
    first, second = machine.cells
    first.tick, second.tick = 1, 2
    for _ in range(7):
        limit.book(first, 1.0)
        assert not limit.book(second, 0.0)
    assert limit.now == 1
    said = [limit.book(second, 1.0) for _ in range(7)]
    assert limit.now == 2
    assert sum(said) == 1


def test_frames_without_which_there_is_no_answer_are_always_let_in() -> None:
    """With skips of one tick the answer to a frame waits for newer ones."""
    circuit = parallel(stages_of([nn.Identity() for _ in range(5)], torch.zeros(1, 1, 1, 1), skips="add"))
    machine = Machine(circuit, Forward())
    limit = LiveLimit(machine, 5, None)
    for cell in machine.cells:
        cell.tick = cell.lag + 1
        for _ in range(10):
            limit.book(cell, 10.0 if cell.number == 1 else 0.0)
    assert (machine.latency, limit.most, limit.now) == (4, 5, 3)
