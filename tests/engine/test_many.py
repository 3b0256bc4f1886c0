"""Several streams through one circuit: each is answered as if it ran alone, whatever becomes of the others."""

from __future__ import annotations

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sidestream as ss
from contract import assert_equal
from random_circuits import random_frames, random_stages
from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.wire import Circuit
from sidestream.circuit.wiring import parallel, pipelined, semi_parallel, sequential, with_periods
from sidestream.engine import EXECUTORS_OF_MANY, run, run_many
from sidestream.errors import CircuitError, InputError, SourceError
from sidestream.nn.combine import Chain, PerFrame
from sidestream.nn.conv3d import Conv3d
from sidestream.nn.shift import OnlineShift

seeds = st.integers(0, 10_000)


def answers_of(outputs: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = defaultdict(list)
    for o in outputs:
        found[o.source].append((o.frame_index, o.oldest_frame_index, o.newest_frame_index, o.tick, o.value))
    return found


def alone(circuit: Circuit, frames: list[Any]) -> list[Any]:
    outputs = run(circuit, frames, executor="inline")
    return [(o.frame_index, o.oldest_frame_index, o.newest_frame_index, o.tick, o.value) for o in outputs]


def live_net(*, looks_ahead: bool = False) -> Circuit:
    torch.manual_seed(0)
    middle = Conv3d(4, 4, 3, padding=1) if looks_ahead else OnlineShift()
    chain = Chain(PerFrame(nn.Conv2d(3, 4, 3, padding=1)), middle, PerFrame(nn.Conv2d(4, 2, 3))).eval()
    return pipelined(ss.cut(chain, torch.rand(1, 3, 8, 8), num_stages=3, costs="uniform"))


def clip(num: int, seed: int) -> list[Tensor]:
    return list(torch.rand(num, 1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_circuits_with_state_keep_their_streams_apart(data: st.DataObject) -> None:
    depth, seed = data.draw(st.integers(1, 6)), data.draw(seeds)
    stages = random_stages(seed, depth, is_stateful=True)
    make = data.draw(st.sampled_from([sequential, pipelined, parallel, "semi", "periods"]))
    if make == "semi":
        circuit = semi_parallel(stages, groups=data.draw(st.integers(1, depth)))
    elif make == "periods":
        circuit = with_periods(pipelined(stages), sorted(data.draw(st.integers(1, 3)) for _ in range(depth)))
    else:
        circuit = make(stages)  # type: ignore[operator]
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    streams = {f"camera {n}": random_frames(seed + n, length) for n, length in enumerate(lengths)}
    executor = data.draw(st.sampled_from(EXECUTORS_OF_MANY))
    found = answers_of(run_many(circuit, streams, executor=executor, num_threads=data.draw(st.integers(1, 4))))
    for name, frames in streams.items():
        assert_equal(found[name], alone(circuit, frames))


@pytest.mark.parametrize("looks_ahead", [False, True])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_model_with_memory(num_threads: int, looks_ahead: bool) -> None:
    circuit = live_net(looks_ahead=looks_ahead)
    streams = {name: clip(num, seed) for seed, (name, num) in enumerate({"a": 12, "b": 3, "c": 1, "d": 20}.items())}
    running = run_many(circuit, streams, num_threads=num_threads)
    found = answers_of(running)
    for name, frames in streams.items():
        assert_equal(found[name], alone(circuit, frames))
        assert (running.stats[name].num_answered, running.stats[name].num_frames) == (len(frames), len(frames))
    assert running.failures == {}


class Camera:
    """A live source that brings a frame when it is let, and may fail."""

    wants_latency = True

    def __init__(self, frames: list[Tensor], *, fails_after: int | None = None, is_stuck_after: int | None = None):
        self.frames, self.fails_after, self.is_stuck_after = frames, fails_after, is_stuck_after
        self.let_go = threading.Event()

    def __iter__(self) -> Iterator[Tensor]:
        for n, frame in enumerate(self.frames):
            if n == self.fails_after:
                raise SourceError("the cable was pulled")
            if n == self.is_stuck_after:
                self.let_go.wait()
            yield frame


def test_a_source_that_fails_ends_alone_after_its_answers() -> None:
    circuit = live_net()
    streams = {"good": Camera(clip(30, 1)), "bad": Camera(clip(30, 2), fails_after=7), "late": Camera(clip(9, 3))}
    running, found = run_many(circuit, streams, num_threads=2), defaultdict(list)
    with pytest.raises(SourceError, match="cable"):
        for o in running:
            found[o.source].append(o.frame_index)
    assert found == {"good": list(range(30)), "bad": list(range(7)), "late": list(range(9))}
    assert list(running.failures) == ["bad"]
    assert list(running) == []


def test_a_source_that_is_stuck_holds_up_nobody_and_can_be_stopped() -> None:
    stuck = Camera(clip(9, 1), is_stuck_after=4)
    running = run_many(live_net(), {"stuck": stuck, "good": Camera(clip(50, 2))}, num_threads=2)
    found: list[tuple[str, int]] = []
    for o in running:
        found.append((o.source, o.frame_index))
        if sum(name == "good" for name, _ in found) == 50:
            running.stop("stuck")  # its source says nothing, so the run ends without it
    assert [n for name, n in found if name == "good"] == list(range(50))
    assert [n for name, n in found if name == "stuck"] == list(range(4))
    stuck.let_go.set()


def test_the_oldest_frame_goes_first_and_every_stream_gets_its_turn() -> None:
    """One worker, three files as fast as they can: answers alternate, none is left behind."""
    circuit = live_net()
    order = [o.source for o in run_many(circuit, {n: clip(40, 1) for n in "abc"}, num_threads=1)]
    for name in "abc":
        places = [n for n, source in enumerate(order[:90]) if source == name]
        assert max(b - a for a, b in itertools.pairwise(places)) <= 12, f"{name} waits"


def test_no_more_than_a_few_frames_are_inside() -> None:
    taken: dict[str, int] = defaultdict(int)

    def source(name: str) -> Iterator[Tensor]:
        for frame in clip(60, 1):
            taken[name] += 1
            yield frame

    running = run_many(live_net(), {name: source(name) for name in "abcd"}, num_threads=2)
    given: dict[str, int] = defaultdict(int)
    for o in running:
        given[o.source] += 1
        time.sleep(0.002)
        assert all(taken[name] - given[name] <= 10 for name in "abcd")
    assert set(given.values()) == {60}


def test_weights_are_there_once_and_an_early_end_leaves_nothing() -> None:
    circuit, before = live_net(), threading.active_count()
    with run_many(circuit, {n: clip(100, 1) for n in "ab"}, num_threads=2) as running:
        next(running)
    assert threading.active_count() == before
    machines = running._machines
    parameters = [{id(p) for cell in m.cells for p in cell.stage.module.parameters()} for m in machines]
    assert parameters[0] == parameters[1] != set()


def test_wrong_input_is_refused() -> None:
    circuit = live_net()
    with pytest.raises(InputError, match="run_many"):
        run(circuit, {"a": clip(2, 1)})
    with pytest.raises(InputError, match="named"):
        run_many(circuit, {})
    with pytest.raises(InputError, match="named"):
        run_many(circuit, {0: clip(2, 1)})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="sequential"):
        run_many(circuit, {"a": clip(2, 1)}, executor="sequential")
    with pytest.raises(InputError, match="num_threads"):
        run_many(circuit, {"a": clip(2, 1)}, num_threads=0)
    running = run_many(circuit, {"a": clip(2, 1)})
    with pytest.raises(InputError, match="no stream 'b'"):
        running.stop("b")
    running.close()


def test_stages_that_would_share_what_they_keep_are_refused() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return x * self.seen

    with pytest.warns(UserWarning, match="outside of its buffers"):
        stages = stages_of([Counts()], torch.rand(1, 3))
    with pytest.raises(CircuitError, match="all streams would share"):
        run_many(pipelined(stages), {"a": [], "b": []})
    drawing = ss.cut(nn.Sequential(nn.Linear(3, 3), nn.Dropout()).train(), torch.rand(1, 3), num_stages=1)
    with pytest.raises(CircuitError, match="random numbers"):
        run_many(pipelined(drawing), {"a": [], "b": []})
