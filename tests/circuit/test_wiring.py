"""Delays, lags and ages: against the design's formulas, and against brute-force path enumeration."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract import check_wiring
from random_circuits import random_frames, random_stages
from sidestream.circuit.ages import (
    ages,
    information_latency_ticks,
    lags_of,
    latency_ticks,
    look_ahead_ticks,
    mixes_ages,
)
from sidestream.circuit.wire import Circuit, Wire
from sidestream.circuit.wiring import parallel, pipelined, semi_parallel, sequential, wire, with_feedback, with_periods
from sidestream.errors import CircuitError

seeds = st.integers(0, 10_000)
depths = st.integers(1, 8)


def path_delays(circuit: Circuit, node: int) -> set[int]:
    """Total delay of every path from the source to ``node``, one path after the other."""
    if node == 0:
        return {0}
    return {d + w.delay for w in circuit.wires if w.target == node for d in path_delays(circuit, w.source)}


@given(seeds, depths, st.integers(1, 3), st.booleans())
def test_pipelined_equals_sequential_shifted(seed: int, depth: int, num_sources: int, is_stateful: bool) -> None:
    stages = random_stages(seed, depth, num_sources=num_sources, is_stateful=is_stateful)
    frames = random_frames(seed, 6, num_sources=num_sources)
    check_wiring(sequential(stages), stages, frames)
    check_wiring(pipelined(stages), stages, frames)
    assert latency_ticks(pipelined(stages)) == depth - 1


@given(seeds, depths, st.data())
def test_semi_parallel_aligned_equals_sequential_shifted(seed: int, depth: int, data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, depth))
    stages = random_stages(seed, depth, is_stateful=True)
    circuit = semi_parallel(stages, groups=groups)
    check_wiring(circuit, stages, random_frames(seed, 5))
    assert latency_ticks(circuit) == groups - 1


@given(seeds, depths)
def test_parallel_with_equalised_skips_is_pipelined(seed: int, depth: int) -> None:
    stages = random_stages(seed, depth)
    assert parallel(stages, equalise_skips=True).wires == pipelined(stages).wires
    check_wiring(parallel(stages, equalise_skips=True), stages, random_frames(seed, 5))


@given(seeds, depths)
def test_ages_are_the_delays_of_all_paths(seed: int, depth: int) -> None:
    stages = random_stages(seed, depth)
    for circuit in (sequential(stages), pipelined(stages), parallel(stages)):
        for node, found in enumerate(ages(circuit)):
            assert found == path_delays(circuit, node)


@given(seeds, st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_an_answer_waits_for_the_stage_that_looks_ahead_farthest(seed: int, delays: list[int]) -> None:
    drawn = random_stages(seed, len(delays))
    stages = drawn.with_stages(tuple(replace(s, delay_ticks=d) for s, d in zip(drawn, delays, strict=True)))
    answered = {link.source for link in stages.links if link.target == len(delays) + 1}
    assert look_ahead_ticks(pipelined(stages)) == sorted(delays[n - 1] for n in answered)[-1]


@pytest.mark.parametrize(("stage", "expected"), [(3, {1, 2}), (4, {2, 3}), (5, {2, 3, 4})])
def test_ages_of_skips_over_one_stage_match_the_derived_table(stage: int, expected: set[int]) -> None:
    wires = [Wire(0, 0, 1, 0, 0)]
    for n in range(2, stage + 1):
        wires.append(Wire(n - 1, 0, n, 0, 1))
        if n > 2:
            wires.append(Wire(n - 2, 0, n, 1, 1))
    circuit = _circuit_of(stage, wires)
    assert ages(circuit)[stage] == expected
    assert mixes_ages(circuit)
    assert latency_ticks(circuit) == max(expected)
    assert information_latency_ticks(circuit) == min(expected)


def _circuit_of(depth: int, wires: list[Wire]) -> Circuit:
    from torch.utils import _pytree as pytree

    from random_circuits import mixing_stage

    stages = tuple(mixing_stage(f"s{n}", n, sum(w.target == n for w in wires), 1, False) for n in range(1, depth + 1))
    wires = [*wires, Wire(depth, 0, depth + 1, 0, 0)]
    return Circuit(stages, tuple(wires), pytree.tree_structure(((0,), {})), pytree.tree_structure(0))


def test_parallel_reads_the_frame_fresh_and_delays_every_other_wire_by_one() -> None:
    circuit = parallel(random_stages(3, 6, skip_chance=0.7))
    for w in circuit.wires:
        assert w.delay == (0 if w.source == 0 or w.target == circuit.sink else 1)


def test_semi_parallel_fresh_delays_only_between_groups() -> None:
    stages = random_stages(3, 6, skip_chance=0.7)
    circuit = semi_parallel(stages, groups=[2, 1, 3], skips="fresh")
    group = [0, 0, 1, 2, 2, 2]
    for w in circuit.wires:
        if w.source and w.target != circuit.sink:
            assert w.delay == int(group[w.source - 1] != group[w.target - 1])
    assert latency_ticks(circuit) == 2


def test_semi_parallel_groups_by_cost() -> None:
    stages = random_stages(1, 6)  # costs 3..7, 1 ms: seeds 101..106 modulo 7, plus 1
    costs = [s.cost_seconds or 0.0 for s in stages]
    lags = lags_of(semi_parallel(stages, groups=3))[1:-1]
    totals = [sum(c for c, lag in zip(costs, lags, strict=True) if lag == g) for g in range(3)]
    best = min(max(sum(costs[:a]), sum(costs[a:b]), sum(costs[b:])) for a in range(1, 5) for b in range(a + 1, 6))
    assert max(totals) == pytest.approx(best)


def test_default_phases_let_each_stage_compute_when_frame_0_arrives() -> None:
    circuit = with_periods(pipelined(random_stages(2, 4)), (1, 2, 2, 4))
    assert circuit.phases == (0, 1, 0, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: wire(s, "spiral"), "unknown wiring 'spiral'"),
        (lambda s: semi_parallel(s, groups=9), "groups=9 for 3 stages"),
        (lambda s: semi_parallel(s, groups=[1, 1]), "do not add up to 3"),
        (lambda s: semi_parallel(s, groups=2, skips="stale"), "expected 'aligned' or 'fresh'"),
        (lambda s: with_periods(pipelined(s), (1, 2)), "2 periods for 3 stages"),
        (lambda s: with_periods(pipelined(s), (2, 1, 1)), "get shorter with depth"),
        (lambda s: with_periods(pipelined(s), (1, 1, 2), phases=(0, 0, 2)), "phase < period"),
        (lambda s: with_feedback(pipelined(s), source=3, output=0, target=1, input=0, initial=None), "initial value"),
        (
            lambda s: with_feedback(pipelined(s), source=3, output=0, target=1, input=0, initial=0.0, delay=0),
            "without a delay",
        ),
        (lambda s: with_feedback(pipelined(s), source=3, output=0, target=1, input=7, initial=0.0), "no input 7"),
        (
            lambda s: with_feedback(
                pipelined(random_stages(0, 3, skip_chance=0.0)), source=3, output=0, target=1, input=0, initial=0.0
            ),
            "reads a frame",
        ),
    ],
)
def test_wiring_errors_say_what_was_given(make: object, message: str) -> None:
    with pytest.raises(CircuitError, match=message):
        make(random_stages(0, 3))  # type: ignore[operator]


def test_one_stage_is_called_one_stage() -> None:
    with pytest.raises(CircuitError, match=r"groups=2 for 1 stage; expected 1\.\.1"):
        semi_parallel(random_stages(0, 1, skip_chance=0.0), groups=2)
