"""Schedules of circuits: against those of devices, a recursion over ticks, closed forms, and the engine itself."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from itertools import chain, islice, pairwise, repeat
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from random_circuits import mixing_stage, random_stages
from sidestream.circuit.ages import information_latency_ticks, latency_ticks
from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.stage import Link, Stages
from sidestream.circuit.wire import Circuit
from sidestream.circuit.wiring import parallel, pipelined, semi_parallel, sequential, wire, with_feedback, with_periods
from sidestream.errors import InputError
from sidestream.evals.streaming import Classes, at_rate, one_device, pipeline, run_live, run_offline
from sidestream.evals.streaming.dataflow import answers_of, dataflow, values_of_ticks
from sidestream.types import Frame, Output

WIRINGS = ("sequential", "pipelined", "parallel", "semi-parallel:2", "semi-parallel:2:fresh")


def row_of(num_stages: int) -> Stages:
    return stages_of([nn.Identity() for _ in range(num_stages)], torch.zeros(1, 3, 2, 2))


def draws(seed: int, num_stages: int, *, most: int = 12) -> Iterator[tuple[Fraction, ...]]:
    """Runtimes of up to ``most`` sixths of a frame."""
    chance = random.Random(seed)
    while True:
        yield tuple(Fraction(chance.randint(1, most), 6) for _ in range(num_stages))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_stages", [1, 2, 5])
def test_a_pipeline_with_a_worker_per_stage_is_the_schedule_of_a_pipeline(num_stages: int, seed: int) -> None:
    circuit = pipelined(row_of(num_stages))
    paced = dataflow(40, circuit, draws(seed, num_stages), intake="paced")
    assert paced.works == pipeline(40, draws(seed, num_stages))
    # where no stage needs longer than a frame, there is room for every frame
    fast = dataflow(40, circuit, draws(seed, num_stages, most=6), max_in_flight=num_stages)
    assert fast.works == pipeline(40, draws(seed, num_stages, most=6))
    assert fast.frames == tuple(range(40))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_stages", [1, 2, 5])
def test_stages_in_a_row_are_one_device_that_never_waits(num_stages: int, seed: int) -> None:
    for num_workers in (1, None):
        found = dataflow(40, sequential(row_of(num_stages)), draws(seed, num_stages), num_workers=num_workers)
        assert found.works == one_device(40, (sum(row) for row in draws(seed, num_stages)))
    assert sum(found.stage_busy) == sum(w.ready - w.start for w in found.works)


def slow_twin(num_frames: int, circuit: Circuit, rows: list[tuple[Fraction, ...]]) -> list[tuple[int, Fraction]]:
    """(frame taken, when its tick's answer comes out), a worker per stage: no events, only maxima over ticks before.

    The camera never ends here, so only ticks that were over by then can be compared.
    """
    K, latency, nearest = circuit.num_stages, latency_ticks(circuit), information_latency_ticks(circuit)
    limit = max(latency - nearest + 1, min(latency + 1, K))

    @cache
    def taken(n: int) -> tuple[int, Fraction]:
        if n < 0:
            return -1, Fraction(0)
        room = out(n - limit + latency) if n >= limit else Fraction(0)
        room = max(room, taken(n - 1)[1])
        frame = max(math.floor(room), taken(n - 1)[0] + 1)
        return frame, max(room, Fraction(frame))

    @cache
    def written(stage: int, n: int) -> tuple[Fraction, bool]:
        """When a stage has written its value of tick n, and whether there is none."""
        if n < 0:
            return Fraction(0), True
        if stage == 0:
            return taken(n)[1], False
        inputs = [written(w.source, n - w.delay) for w in circuit.wires_into(stage)]
        is_silent = any(silent for _, silent in inputs)
        start = max(*(time for time, _ in inputs), written(stage, n - 1)[0])
        return start + (0 if is_silent else rows[n - lag_of(circuit, stage)][stage - 1]), is_silent

    @cache
    def out(n: int) -> Fraction:
        if n < 0:
            return Fraction(0)
        return max(out(n - 1), *(written(w.source, n - w.delay)[0] for w in circuit.wires_into(K + 1)))

    found: list[tuple[int, Fraction]] = []
    while taken(len(found))[0] < num_frames:
        found.append((taken(len(found))[0], out(len(found))))
    return found


def lag_of(circuit: Circuit, stage: int) -> int:
    """The longest path from the camera, in ticks."""
    return max(w.delay + (lag_of(circuit, w.source) if w.source else 0) for w in circuit.wires_into(stage))


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("seed", range(8))
def test_any_circuit_is_a_recursion_over_its_ticks(wiring: str, seed: int) -> None:
    circuit = wire(random_stages(seed, 2 + seed % 5), wiring)
    most = (4, 12, 30)[seed % 3]
    rows = list(islice(draws(seed, circuit.num_stages, most=most), 200))
    found = dataflow(30, circuit, rows, max_in_flight=circuit.num_stages)
    expected = slow_twin(30, circuit, rows)
    assert found.frames == tuple(frame for frame, _ in expected)
    ready = {a.tick: a.ready for a in found.answers}
    late = range(latency_ticks(circuit), len(expected))
    assert len(late) > 0 or not ready
    assert [ready[n] for n in late] == [expected[n][1] for n in late]


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("num_workers", [1, 2, None])
def test_no_answer_comes_before_the_frames_that_it_depends_on(wiring: str, num_workers: int | None) -> None:
    for seed in range(5):
        circuit = wire(random_stages(seed, 6), wiring)
        found = dataflow(40, circuit, draws(seed, 6, most=3), num_workers=num_workers)
        taken = dict(zip(found.frames, found.taken, strict=True))
        assert list(found.taken) == sorted(found.taken)
        assert all(time >= frame for frame, time in taken.items())
        assert all(a.ready > taken[a.newest_frame_index] >= taken[a.frame_index] for a in found.answers)
        assert [a.frame_index for a in found.answers] == list(found.frames)
        early = information_latency_ticks(circuit)
        in_clip = [a for a in found.answers if a.tick < len(found.frames)]
        assert [a.newest_frame_index for a in in_clip] == [found.frames[a.tick - early] for a in in_clip]


@pytest.mark.parametrize("wiring", WIRINGS)
def test_more_workers_bring_no_fewer_answers(wiring: str) -> None:
    circuit = wire(row_of(6), wiring)
    counts = []
    for num_workers in (1, 2, 3, 6):
        found = dataflow(120, circuit, repeat((Fraction(1, 2),) * 6), num_workers=num_workers)
        counts.append(len(found.answers))
        assert sum(found.worker_busy) == sum(found.stage_busy)
        assert len(found.worker_busy) == num_workers
        assert all(0 <= share <= 1 for share in found.busy_shares(found.worker_busy))
    assert counts == sorted(counts)
    assert counts[-1] == counts[0] if wiring == "sequential" else counts[-1] > 1.5 * counts[0]


def settled(found: Any) -> tuple[Fraction, Fraction]:
    """Frames from answer to answer, and from taking up a frame to the answer about it, far from both ends."""
    ready = [w.ready for w in found.works][20:40]
    ages = {w.ready - w.start for w in found.works[20:40]}
    (gap,), (age,) = {b - a for a, b in pairwise(ready)}, ages
    return gap, age


def test_periods_and_latencies_of_the_wirings() -> None:
    """Stages of 1, 2, 3, 2 eighths of a frame and of the same in whole frames."""
    for unit in (Fraction(1, 8), Fraction(1)):
        times = (1 * unit, 2 * unit, 3 * unit, 2 * unit)
        stages, rows = row_of(4), repeat(times)
        assert settled(dataflow(200, sequential(stages), rows))[1] == sum(times)
        assert settled(dataflow(200, pipelined(stages), rows, intake="paced")) == (max(1, max(times)), sum(times))
        # where stages are slow, four frames are inside, one per stage, or only as many as full speed needs: 8 / 3
        full = dataflow(200, pipelined(stages), rows, max_in_flight=4)
        assert settled(full) == (max(1, max(times)), sum(times) if unit < 1 else 4 * max(times))
        enough = dataflow(200, pipelined(stages), rows)
        assert settled(enough) == (max(1, max(times)), sum(times) if unit < 1 else 3 * max(times))
        assert full.busy_shares(full.stage_busy)[2] == pytest.approx(float(max(times) / max(1, max(times))), abs=0.05)
        groups = semi_parallel(stages, groups=[3, 1])  # 6 and 2 of 8
        even = semi_parallel(stages, groups=[2, 2])  # 3 and 5
        if unit == 1:
            # two frames inside, one per group, on two workers: neither idles, so 8 units of work take 4
            assert len(dataflow(400, even, rows, num_workers=2).works) == pytest.approx(100, abs=3)
            assert len(dataflow(400, groups, rows, num_workers=2).works) <= 101
    ready = [w.ready for w in dataflow(300, even, repeat((2, 1, 1, 2)), num_workers=2).works]
    assert ready[60] - ready[20] == 40 * 3  # the larger group's sum


@pytest.mark.parametrize("seed", range(20))
def test_no_more_frames_are_inside_than_full_speed_needs(seed: int) -> None:
    """A camera that is faster than any stage: as many answers as with all the room, and none that waited longer than
    the rounding up to whole frames makes it."""
    chance = random.Random(seed)
    times = tuple(Fraction(chance.randint(2, 12), 2) for _ in range(chance.randint(2, 7)))
    circuit = pipelined(row_of(len(times)))
    for num_workers in (None, 2):
        every = max(max(times), sum(times) / (num_workers or len(times)))
        free = dataflow(600, circuit, repeat(times), num_workers=num_workers)
        full = dataflow(600, circuit, repeat(times), num_workers=num_workers, max_in_flight=num_workers or len(times))
        assert len(free.works) >= len(full.works) - len(times)  # less what was inside before the times were known
        inside = [sum(w.start <= each.start < w.ready for w in free.works) for each in free.works[30:-10]]
        assert max(inside) <= math.ceil(sum(times) / every)
        if num_workers is None:
            assert settled(free)[1] < sum(times) + every


@pytest.mark.parametrize("seed", range(6))
def test_times_that_vary_leave_room(seed: int) -> None:
    """Between a sixth and a whole frame, anew for every stage and frame, and one hiccup of ten frames: of those that
    the engine answers with all the room, hardly one is lost."""
    circuit = pipelined(row_of(5))

    def rows() -> Iterator[tuple[Fraction, ...]]:
        for n, row in enumerate(draws(seed, 5, most=6)):
            yield row if n != 100 else (*row[:2], Fraction(10), *row[3:])

    full = dataflow(400, circuit, rows(), max_in_flight=5)
    free = dataflow(400, circuit, rows())
    assert len(free.works) >= 0.97 * len(full.works)


def test_the_parallel_wiring_answers_as_soon_as_the_newest_way_is_through() -> None:
    """A skip from the first to the last of four stages: new frames influence the answer one tick later."""
    stages = row_of(3)
    fast = dataflow(20, parallel(stages), repeat((Fraction(1, 4),) * 3))
    assert [a.ready for a in fast.answers[:3]] == [Fraction(3, 4), Fraction(7, 4), Fraction(11, 4)]  # before tick 2
    values = {n: Classes(((n, 1.0),)) for n in range(30)}
    logged = answers_of(fast, values, frame_rate=10.0, clip="c", judged_frame="newest")
    assert [a.frame_index for a in logged] == list(range(2, 20))
    assert [a.ready_seconds for a in logged] == [n / 10 for n in range(2, 20)]  # a prediction is for its own moment
    own = answers_of(fast, values, frame_rate=10.0, clip="c")
    assert [a.frame_index for a in own] == list(range(20))
    assert [a.ready_seconds for a in own[:3]] == pytest.approx([0.075, 0.175, 0.275])


def test_a_stage_with_a_slow_clock_works_in_its_own_ticks_only() -> None:
    slow = with_periods(pipelined(row_of(3)), (1, 2, 4))
    found = dataflow(80, slow, repeat((Fraction(1, 4),) * 3))
    assert found.stage_busy == (20, 10, 5)


def test_a_stage_waits_for_what_is_fed_back() -> None:
    stages = (mixing_stage("a", 0, 2, 1, False), mixing_stage("b", 1, 1, 1, False))
    links = (Link(0, 0, 1, 0), Link(0, 0, 1, 1), Link(1, 0, 2, 0), Link(2, 0, 3, 0))
    specs = pytree.tree_structure(((torch.zeros(5),), {})), pytree.tree_structure(0)
    row = pipelined(Stages(stages, links, *specs))
    back = with_feedback(row, source=2, output=0, target=1, input=1, initial=torch.zeros(5))
    rows = repeat((Fraction(3, 4), Fraction(1, 2)))
    assert [a.ready for a in dataflow(9, row, rows).answers][:3] == [Fraction(5, 4), Fraction(9, 4), Fraction(13, 4)]
    # tick n of the first stage needs tick n - 1 of the second, which needs its tick n - 2: two ticks in 5/4 frames
    fed = dataflow(9, back, repeat((Fraction(3, 2), Fraction(1))))
    ready = [a.ready for a in fed.answers]
    assert ready[:2] == [Fraction(5, 2), 4]


class Shifted(nn.Module):
    """Adds a level, so that a wrong order of stages or frames would show."""

    def __init__(self, level: float) -> None:
        super().__init__()
        self.level = level

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return image_BCHW + self.level


def clip(num_frames: int, rate: float) -> list[Frame]:
    return at_rate((Frame(torch.full((2, 2, 3), n, dtype=torch.uint8), n, n / rate) for n in range(num_frames)), rate)


def image(frame: Frame) -> Tensor:
    return frame.image_BCHW


def level(output: Output) -> Classes:
    return Classes(((0, round(float(output.value.mean()) * 255.0)),))


@pytest.mark.parametrize("wiring", WIRINGS)
def test_only_the_frames_of_the_schedule_are_fed_and_answers_stand_by_their_tick(wiring: str) -> None:
    circuit = wire(stages_of([Shifted(0.0) for _ in range(4)], torch.zeros(1, 3, 2, 2)), wiring)
    flow = dataflow(30, circuit, repeat((1.3, 0.8, 0.4, 0.9)))
    assert len(flow.frames) < 30
    values = values_of_ticks(circuit, clip(30, 10.0), flow.frames, answer=level, prepare=image)
    assert {a.tick for a in flow.answers if not a.is_warm_up} == set(values)
    logged = answers_of(flow, values, frame_rate=10.0, clip="c")
    assert [a.value.top[0][1] for a in logged] == [a.frame_index for a in logged] == list(flow.frames)
    newest = answers_of(flow, values, frame_rate=10.0, clip="c", judged_frame="newest")
    lag = latency_ticks(circuit)
    assert [a.frame_index for a in newest] == list(flow.frames[lag:])
    assert [a.value.top[0][1] for a in newest] == list(flow.frames[: len(flow.frames) - lag])
    assert all(a.ready_seconds >= a.pts_seconds for a in newest)


def test_a_prediction_is_held_until_its_frame_is_taken_up() -> None:
    """Four slow stages on two workers: frames wait until a worker is free, and what was made before waits for them."""
    circuit = wire(stages_of([Shifted(0.0) for _ in range(4)], torch.zeros(1, 3, 2, 2)), "pipelined")
    flow = dataflow(40, circuit, repeat((1.4, 0.9, 1.2, 0.7)), num_workers=2)
    values = values_of_ticks(circuit, clip(40, 10.0), flow.frames, answer=level, prepare=image)
    logged = {a.frame_index: a for a in answers_of(flow, values, frame_rate=10.0, clip="c", judged_frame="newest")}
    num_held = 0
    for made in flow.answers:
        if not made.is_warm_up and made.tick < len(flow.frames):
            taken = flow.taken[made.tick]
            num_held += made.ready < taken and taken > flow.frames[made.tick]  # later than when it came
            assert logged[flow.frames[made.tick]].ready_seconds == pytest.approx(max(made.ready, taken) / 10.0)
    assert num_held > 0


def test_a_device_that_takes_no_time_gives_what_an_offline_run_gives() -> None:
    circuit = parallel(stages_of([Shifted(0.0) for _ in range(3)], torch.zeros(1, 3, 2, 2)))
    flow = dataflow(9, circuit, repeat((0, 0, 0)))
    values = values_of_ticks(circuit, clip(9, 10.0), flow.frames, answer=level, prepare=image)
    logged = answers_of(flow, values, frame_rate=10.0, clip="c", judged_frame="newest")
    offline = run_offline(circuit, clip(9, 10.0), answer=level, clip="c", judged_frame="newest", prepare=image)
    assert [(a.frame_index, a.ready_seconds, a.value) for a in logged] == [
        (a.frame_index, a.ready_seconds, a.value) for a in offline
    ]


class Asleep(nn.Module):
    """Sleeps in place of working, and remembers how long that took."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.took = seconds, list[float]()

    def forward(self, image_BCHW: Tensor) -> Tensor:
        started = time.perf_counter()
        time.sleep(self.seconds)
        self.took.append(time.perf_counter() - started)
        return image_BCHW


@pytest.mark.parametrize(("wiring", "num_workers"), [("pipelined", 4), ("parallel", 2), ("semi-parallel:2:fresh", 2)])
def test_the_engine_runs_by_the_schedule(wiring: str, num_workers: int) -> None:
    """In real time; the schedule is drawn from what the stages really took. A busy machine may be late."""
    rate, num_frames, found = 15.7, 20, []
    for _ in range(3):
        asleep = [Asleep(0.0) for _ in range(4)]
        circuit = wire(stages_of(asleep, torch.zeros(1, 3, 2, 2)), wiring)
        for stage, seconds in zip(asleep, (0.05, 0.02, 0.07, 0.03), strict=True):
            stage.seconds = seconds
            stage.took.clear()
        options: dict[str, Any] = {"executor": "threads", "num_threads": num_workers, "prepare": image}
        live = run_live(circuit, clip(num_frames, rate), answer=level, clip="c", **options)
        usual = [statistics.median(stage.took) for stage in asleep]
        took = chain(zip(*(stage.took for stage in asleep), strict=False), repeat(usual))
        flow = dataflow(num_frames, circuit, ([s * rate for s in row] for row in took), num_workers=num_workers)
        expected = statistics.median(float(w.ready - w.frame_index) / rate for w in flow.works)
        age = statistics.median(a.ready_seconds - a.pts_seconds for a in live)
        found.append((age, expected, len(live), len(flow.works)))
        if abs(age - expected) < 0.035 and abs(len(live) - len(flow.works)) <= 2:
            return
    pytest.fail(f"age and expected age of the answers, how many and expected: {found}")


def test_what_cannot_be_scheduled_is_refused() -> None:
    circuit = pipelined(row_of(2))
    with pytest.raises(InputError, match="num_workers = 0; give 1"):
        dataflow(9, circuit, repeat((1, 1)), num_workers=0)
    with pytest.raises(InputError, match=r"row 0 .* is \(1,\); give 2 times"):
        dataflow(9, circuit, repeat((1,)))
    with pytest.raises(InputError, match=r"row 1 .* is None"):
        dataflow(9, circuit, [(1, 1)])
    with pytest.raises(InputError, match="of 0 or more"):
        dataflow(9, circuit, repeat((1, -1)))
