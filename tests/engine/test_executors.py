"""Every executor equals ``inline`` to the bit; ends, stops and failures leave nothing behind."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contract import check_executor
from random_circuits import random_frames, random_stages
from sidestream.circuit.chart import schedule
from sidestream.circuit.stage import NOTHING, Stage, Stages, State, Values
from sidestream.circuit.wire import Circuit
from sidestream.circuit.wiring import parallel, pipelined, semi_parallel, sequential, with_feedback, with_periods
from sidestream.engine import run
from sidestream.errors import CircuitError, InputError, LayoutError, StageError

seeds = st.integers(0, 10_000)


def any_circuit(data: st.DataObject, *, is_stateful: bool) -> Circuit:
    depth = data.draw(st.integers(1, 8))
    stages = random_stages(data.draw(seeds), depth, is_stateful=is_stateful)
    make = data.draw(st.sampled_from([sequential, pipelined, parallel, "semi", "fresh", "periods", "feedback"]))
    if make == "semi" or make == "fresh":
        groups = data.draw(st.integers(1, depth))
        return semi_parallel(stages, groups=groups, skips="aligned" if make == "semi" else "fresh")
    if make == "periods":
        return with_periods(pipelined(stages), sorted(data.draw(st.integers(1, 3)) for _ in range(depth)))
    if make == "feedback":
        target = data.draw(st.integers(1, depth))
        zeros = torch.zeros(5, dtype=torch.float64)
        options = {"target": target, "input": 0, "initial": zeros, "delay": data.draw(st.integers(1, 3))}
        extra = replace(stages.stages[target - 1])
        return with_feedback(
            pipelined(with_extra_input(stages, target)),
            source=depth,
            output=0,
            **(options | {"input": extra.num_inputs}),
        )
    return make(stages)  # type: ignore[operator]


def with_extra_input(stages: Stages, target: int) -> Stages:
    """One more input at the end of a stage, for now fed by the source: a place to feed back into."""
    from sidestream.circuit.stage import Link

    old = stages.stages[target - 1]

    def step(inputs: Values, state: State) -> tuple[Values, State]:
        outputs, state = old.step(inputs[:-1], state)
        return tuple(o + 0.5 * inputs[-1] for o in outputs), state

    new = replace(old, step=step, num_inputs=old.num_inputs + 1)
    members = tuple(new if n == target else s for n, s in enumerate(stages.stages, start=1))
    return replace(stages, stages=members, links=(*stages.links, Link(0, 0, target, old.num_inputs)))


@settings(max_examples=150, deadline=None)
@given(st.data(), st.booleans(), st.integers(0, 12), st.integers(1, 4), st.integers(1, 9))
def test_threads_equals_inline(
    data: st.DataObject, is_stateful: bool, num_frames: int, num_threads: int, in_flight: int
) -> None:
    circuit = any_circuit(data, is_stateful=is_stateful)
    check_executor("threads", circuit, random_frames(1, num_frames), num_threads=num_threads, max_in_flight=in_flight)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 6), st.sampled_from([sequential, pipelined]), st.integers(0, 9), st.integers(1, 4))
def test_the_baselines_equal_inline(seed: int, depth: int, make: object, num_frames: int, num_threads: int) -> None:
    circuit = make(random_stages(seed, depth))  # type: ignore[operator]
    for executor in ("sequential", "frame-parallel"):
        check_executor(executor, circuit, random_frames(1, num_frames), num_threads=num_threads)


@pytest.mark.parametrize(("is_stateful", "make"), [(False, pipelined), (True, pipelined), (False, parallel)])
def test_auto_equals_inline(is_stateful: bool, make: object) -> None:
    circuit = make(random_stages(4, 5, is_stateful=is_stateful))  # type: ignore[operator]
    for num_frames in (0, 1, 7):
        check_executor("auto", circuit, random_frames(1, num_frames))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 8))
def test_the_frames_in_an_answer_are_those_of_the_schedule(data: st.DataObject, num_frames: int) -> None:
    circuit = any_circuit(data, is_stateful=False)
    if circuit.has_feedback:
        return  # the schedule leaves feedback out
    outputs = list(run(circuit, random_frames(2, num_frames), executor="inline"))
    table = schedule(circuit, num_frames + 10)
    for output in outputs:
        held = {f for f in table[output.tick][-1] if f < num_frames}
        assert (output.oldest_frame_index, output.newest_frame_index) == (min(held), max(held))


class Slow:
    """A stage that takes a fixed time and records when it was at work, and on what."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.spans: list[tuple[float, float, float]] = []

    def __call__(self, inputs: Values, state: State) -> tuple[Values, State]:
        started = time.perf_counter()
        time.sleep(self.seconds)
        self.spans.append((float(inputs[0].sum()), started, time.perf_counter()))
        return (inputs[0] + 0,), state


def chain(steps: list[object], **fields: object) -> Stages:
    from torch.utils import _pytree as pytree

    from sidestream.circuit.stage import Link

    stages = tuple(Stage(f"s{n}", s, 1, 1, **fields) for n, s in enumerate(steps, start=1))  # type: ignore[arg-type]
    links = tuple(Link(n, 0, n + 1, 0) for n in range(len(steps) + 1))
    return Stages(stages, links, pytree.tree_structure(((0,), {})), pytree.tree_structure(0))


def numbers(count: int | None = None) -> Iterator[Tensor]:
    return (torch.tensor([float(n)]) for n in (itertools.count() if count is None else range(count)))


def test_stages_work_at_the_same_time_on_different_frames_and_each_on_one() -> None:
    steps = [Slow(0.02) for _ in range(3)]
    outputs = list(run(pipelined(chain(list(steps))), numbers(8), executor="threads", num_threads=3, max_in_flight=3))
    assert len(outputs) == 8
    for step in steps:
        assert [s[0] for s in step.spans] == [float(n) for n in range(8)]  # in order
        assert all(a[2] <= b[1] for a, b in itertools.pairwise(step.spans))  # one at a time
    together = [
        {a[0], b[0], c[0]}
        for a in steps[0].spans
        for b in steps[1].spans
        for c in steps[2].spans
        if max(a[1], b[1], c[1]) < min(a[2], b[2], c[2])
    ]
    assert any(len(frames) == 3 for frames in together)  # three stages at work on three frames


def test_an_answer_does_not_wait_for_the_next_frame() -> None:
    """A pipeline of five on a slow source: each answer comes before the next frame does, K - 1 ticks or not."""
    given_at: list[float] = []

    def slow_source() -> Iterator[Tensor]:
        for frame in numbers(4):
            given_at.append(time.perf_counter())
            yield frame
            time.sleep(0.25)

    answered_at = []
    for output in run(pipelined(chain([Slow(0.001)] * 5)), slow_source(), executor="threads"):
        answered_at.append(time.perf_counter())
        assert output.age_ticks == 4
    assert all(answer < following for answer, following in zip(answered_at, given_at[1:], strict=False))


def test_frames_in_flight_never_exceed_the_registers_or_the_limit() -> None:
    inside, most, lock = set(), [0], threading.Lock()

    def enter(inputs: Values, state: State) -> tuple[Values, State]:
        with lock:
            inside.add(float(inputs[0]))
            most[0] = max(most[0], len(inside))
        return inputs, state

    def leave(inputs: Values, state: State) -> tuple[Values, State]:
        time.sleep(0.003)
        with lock:
            inside.discard(float(inputs[0]))
        return inputs, state

    stages = chain([enter, Slow(0.0), Slow(0.0), leave])
    for circuit, limit, expected in [
        (sequential(stages), None, 1),
        (pipelined(stages), 2, 2),
        (pipelined(stages), 9, 4),
    ]:
        most[0] = 0
        list(run(circuit, numbers(30), executor="threads", num_threads=4, max_in_flight=limit))
        assert most[0] <= expected


@pytest.mark.parametrize("executor", ["inline", "threads", "sequential", "frame-parallel"])
def test_a_failing_stage_ends_the_run_and_is_named_with_its_frame(executor: str) -> None:
    def explode(inputs: Values, state: State) -> tuple[Values, State]:
        if float(inputs[0]) == 5:
            raise ValueError("boom")
        return inputs, state

    before = threading.active_count()
    answered = []
    with pytest.raises(StageError, match=r"stage 2 \(s2\) failed on frame 5 .*ValueError: boom"):
        for output in run(pipelined(chain([Slow(0.0), explode, Slow(0.0)])), numbers(), executor=executor):
            answered.append(output.frame_index)
    assert answered == list(range(len(answered)))
    assert max(answered, default=-1) < 5
    time.sleep(0.05)
    assert threading.active_count() <= before


@pytest.mark.parametrize("executor", ["inline", "threads", "frame-parallel"])
def test_a_failing_source_raises_what_it_raised(executor: str) -> None:
    def broken() -> Iterator[Tensor]:
        yield from numbers(3)
        raise OSError("cable pulled")

    answered = []
    with pytest.raises(OSError, match="cable pulled"):
        for output in run(pipelined(chain([Slow(0.0)] * 3)), broken(), executor=executor):
            answered.append(output.frame_index)
    assert answered == [0, 1, 2]  # what came before is answered first


def test_a_prepare_that_raises_stop_iteration_does_not_end_the_stream_silently() -> None:
    from sidestream.video import SyntheticVideo

    def prepare(frame: object) -> object:
        return next(iter(()))

    frames = SyntheticVideo(num_frames=3, size_px=(16, 16))
    with pytest.raises(RuntimeError, match="prepare function raised StopIteration"):
        list(run(pipelined(chain([Slow(0.0)] * 2)), frames, prepare=prepare))


@pytest.mark.parametrize("executor", ["inline", "threads", "sequential", "frame-parallel", "auto"])
def test_stop_answers_every_frame_that_was_taken(executor: str) -> None:
    running = run(pipelined(chain([Slow(0.001)] * 3)), numbers(), executor=executor)
    answered = []
    for output in running:
        answered.append(output.frame_index)
        if len(answered) == 10:
            running.stop()
    assert answered == list(range(running.stats.num_frames))


def test_stop_ends_a_run_whose_source_is_stuck() -> None:
    stuck = threading.Event()

    def source() -> Iterator[Tensor]:
        yield from numbers(2)
        stuck.wait(30)

    mixing = with_extra_input(chain([Slow(0.0)] * 3), 3)  # its answers need frames that will never come
    for executor, circuit in (
        ("threads", pipelined(chain([Slow(0.0)] * 2))),
        ("threads", parallel(mixing)),
        ("frame-parallel", pipelined(chain([Slow(0.0)] * 2))),
    ):
        running = run(circuit, source(), executor=executor)
        threading.Timer(0.2, running.stop).start()
        started = time.perf_counter()
        answered = [o.frame_index for o in running]
        assert answered == ([] if circuit.wiring == "parallel" else [0, 1])
        assert time.perf_counter() - started < 15
    stuck.set()


def test_leaving_early_ends_the_threads() -> None:
    before = threading.active_count()
    with run(pipelined(chain([Slow(0.001)] * 3)), numbers(), executor="threads") as running:
        next(running)
    time.sleep(0.05)
    assert threading.active_count() <= before


def test_a_slow_reader_holds_the_source_back() -> None:
    taken = [0]

    def source() -> Iterator[Tensor]:
        for frame in numbers():
            taken[0] += 1
            yield frame

    with run(pipelined(chain([Slow(0.0)] * 3)), source(), executor="threads") as running:
        next(running)
        time.sleep(0.2)
        assert taken[0] < 15


def test_workers_use_one_intra_op_thread_each() -> None:
    seen: list[int] = []

    def look(inputs: Values, state: State) -> tuple[Values, State]:
        seen.append(torch.get_num_threads())
        return inputs, state

    before = torch.get_num_threads()
    for executor, expected in (("threads", 1), ("frame-parallel", 1), ("sequential", 2), ("inline", 1)):
        seen.clear()
        list(run(pipelined(chain([look] * 2)), numbers(3), executor=executor, num_threads=2))
        assert set(seen) == {expected}, executor
        assert torch.get_num_threads() == before
        seen.clear()
        thread = threading.Thread(target=look, args=((), None))
        thread.start()
        thread.join()
        assert seen == [before]  # what the workers set is not left behind


@pytest.mark.parametrize("executor", ["threads", "frame-parallel"])
def test_workers_keep_to_one_thread_whatever_another_thread_sets_meanwhile(executor: str) -> None:
    seen: list[int] = []
    before = torch.get_num_threads()

    def look(inputs: Values, state: State) -> tuple[Values, State]:
        other = threading.Thread(target=torch.set_num_threads, args=(3,))
        other.start()
        other.join()
        seen.append(torch.get_num_threads())
        return inputs, state

    try:
        list(run(pipelined(chain([look] * 2)), numbers(3), executor=executor, num_threads=2))
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 6
    assert set(seen) == {1}


def test_slow_clocks_do_the_work_that_their_periods_promise() -> None:
    counts = [0, 0, 0]

    def counting(n: int) -> object:
        def step(inputs: Values, state: State) -> tuple[Values, State]:
            counts[n] += 1
            return (inputs[0] + 0,), state

        return step

    circuit = with_periods(pipelined(chain([counting(n) for n in range(3)])), (1, 2, 4))
    outputs = list(run(circuit, numbers(16), executor="inline"))
    assert len(outputs) == 16
    assert counts == [16, 8, 4]
    assert [float(o.value) for o in outputs] == [float(4 * (n // 4)) for n in range(16)]


def test_a_stage_may_swallow_frames() -> None:
    def every_other(inputs: Values, state: State) -> tuple[Values, State]:
        return (inputs[0] if state % 2 else NOTHING,), state + 1

    stages = chain([every_other, Slow(0.0)], init_state=lambda: 0)
    second = replace(stages.stages[1], init_state=None)
    stages = stages.with_stages((stages.stages[0], second))
    for executor in ("inline", "threads"):
        outputs = list(run(pipelined(stages), numbers(7), executor=executor))
        assert [(o.frame_index, float(o.value)) for o in outputs] == [(1, 1.0), (3, 3.0), (5, 5.0)]


def test_warm_up_marks_answers_in_which_a_fed_back_initial_value_has_a_part() -> None:
    stages = with_extra_input(chain([lambda i, s: ((i[0] + 0,), s)] * 2), 1)
    circuit = with_feedback(pipelined(stages), source=2, output=0, target=1, input=1, initial=torch.zeros(1), delay=2)
    outputs = list(run(circuit, numbers(7), executor="threads"))
    # the fed-back answer of tick t - 2 exists from tick 3 on (the first answer is made in tick 1)
    assert [o.is_warm_up for o in outputs][:2] == [True, True]
    assert not any(o.is_warm_up for o in outputs[3:])


def test_frame_parallel_refuses_what_depends_on_order() -> None:
    stateful = random_stages(5, 4, is_stateful=True)
    assert stateful.is_stateful
    with pytest.raises(CircuitError, match="stages with state"):
        run(pipelined(stateful), numbers(3), executor="frame-parallel")
    skipping = random_stages(3, 4, skip_chance=0.9)
    with pytest.raises(CircuitError, match="mixes frames of different ages"):
        run(parallel(skipping), numbers(3), executor="frame-parallel")


def test_auto_leaves_frame_parallel_out_where_there_is_state_and_says_so() -> None:
    running = run(pipelined(random_stages(5, 4, is_stateful=True)), random_frames(0, 4), executor="auto")
    assert running.choice is not None
    assert "frame-parallel left out" in running.choice.reason
    assert {t.executor for t in running.choice.trials} == {"sequential", "threads"}
    assert [o.frame_index for o in running] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        ("a string", InputError, "a stream item is a str"),
        ((torch.zeros(5), torch.zeros(5)), LayoutError, "cut for inputs of the structure"),
        ({"x": torch.zeros(5)}, LayoutError, "cut for inputs of the structure"),
    ],
)
def test_wrong_items_are_refused(item: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        list(run(pipelined(random_stages(0, 2)), [item], executor="threads"))


def test_frames_without_an_arrival_time_arrive_when_they_are_taken() -> None:
    from sidestream.video import SyntheticVideo

    frames = SyntheticVideo(num_frames=4, size_px=(16, 16))
    circuit = pipelined(chain([lambda i, s: ((i[0].sum(),), s)] * 2))
    for executor in ("inline", "threads", "frame-parallel", "auto"):
        running = run(circuit, frames, executor=executor)
        assert all(0 <= o.latency_seconds < 1.0 for o in running)
        assert 0 < running.stats.elapsed_seconds < 2.0


def test_ctrl_c_while_waiting_answers_what_is_in_flight_first() -> None:
    import _thread

    def source() -> Iterator[Tensor]:
        for n, frame in enumerate(numbers()):
            if n == 5:
                _thread.interrupt_main()
            yield frame
            time.sleep(0.01)

    for executor in ("threads", "frame-parallel"):
        answered = []
        running = run(pipelined(chain([Slow(0.03)] * 3)), source(), executor=executor)
        with pytest.raises(KeyboardInterrupt):
            for output in running:
                answered.append(output.frame_index)
        assert answered == list(range(running.stats.num_frames))
        assert len(answered) >= 5


def test_wrong_options_are_refused() -> None:
    circuit = pipelined(random_stages(0, 2))
    with pytest.raises(InputError, match="unknown executor 'gpu'"):
        run(circuit, [], executor="gpu")
    with pytest.raises(InputError, match="num_threads=0"):
        run(circuit, [], num_threads=0)


def test_bounded_memory_over_many_frames() -> None:
    running = run(pipelined(chain([lambda i, s: ((i[0] + 0,), s)] * 3)), numbers(20_000), executor="threads")
    for output in running:
        if output.frame_index % 5000 == 4999:
            machine = running._machines[0]
            assert sum(len(line) for cell in machine.cells for line in cell.inbox) < 20
            assert len(machine._fed) < 10
    assert running.stats.num_answered == 20_000
    assert len(running.stats.latencies_seconds) <= 10_000


def test_a_circuit_in_which_one_stage_is_slower_than_the_others_is_no_rival() -> None:
    circuit = with_periods(pipelined(chain([lambda inputs, state: (inputs, state)] * 3)), (1, 1, 2))
    with pytest.raises(CircuitError, match="some of its stages do not compute on every frame"):
        run(circuit, numbers(3), executor="frame-parallel")
