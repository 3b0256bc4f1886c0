"""Partitions against brute force over all of them."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestream.circuit.balance import BYTES_SHARE, auto_num_stages, balanced, largest_part, partition
from sidestream.errors import CutError

whole_costs = st.lists(st.integers(0, 30), min_size=1, max_size=9)


def part_costs(costs: list[float], boundaries: tuple[int, ...]) -> list[float]:
    return [sum(costs[start:end]) for start, end in pairwise([0, *boundaries, len(costs)])]


def all_partitions(num_items: int, num_parts: int) -> list[tuple[int, ...]]:
    return list(combinations(range(1, num_items), num_parts - 1))


@given(whole_costs, st.data())
def test_partition_equals_brute_force(costs: list[int], data: st.DataObject) -> None:
    num_parts = data.draw(st.integers(1, len(costs)))
    candidates = all_partitions(len(costs), num_parts)
    lowest = min(max(part_costs(costs, c)) for c in candidates)
    best = [c for c in candidates if max(part_costs(costs, c)) == lowest]
    expected = min(best, key=lambda c: (sum(p * p for p in part_costs(costs, c)), c))
    assert partition(costs, num_parts) == expected
    assert largest_part(costs, num_parts) == lowest


@given(whole_costs, st.data())
def test_partition_trades_crossings_for_evenness_within_the_slack(costs: list[int], data: st.DataObject) -> None:
    num_parts = data.draw(st.integers(1, len(costs)))
    crossings = data.draw(st.lists(st.integers(0, 5), min_size=len(costs), max_size=len(costs)))
    slack = data.draw(st.sampled_from([0.0, 0.25, 1.0]))
    candidates = all_partitions(len(costs), num_parts)
    limit = min(max(part_costs(costs, c)) for c in candidates) * (1 + slack)
    near = [c for c in candidates if max(part_costs(costs, c)) <= limit]
    squares = {c: sum(p * p for p in part_costs(costs, c)) for c in near}
    crossed = {c: sum(crossings[b] for b in c) for c in near}
    even = min(near, key=lambda c: (squares[c], c))

    def price(c: tuple[int, ...]) -> float:
        return squares[c] / max(squares[even], 1) + BYTES_SHARE * crossed[c] / max(crossed[even], 1)

    chosen = partition(costs, num_parts, crossings=crossings, slack=slack)
    assert chosen in near
    if crossed[even] and squares[even]:
        assert price(chosen) == pytest.approx(min(map(price, near)), rel=1e-12)
    else:
        assert chosen == even


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=9), st.data())
def test_partition_of_real_numbers_is_a_lowest_one(costs: list[float], data: st.DataObject) -> None:
    num_parts = data.draw(st.integers(1, len(costs)))
    lowest = min(max(part_costs(costs, c)) for c in all_partitions(len(costs), num_parts))
    boundaries = partition(costs, num_parts)
    assert len(boundaries) == num_parts - 1
    assert max(part_costs(costs, boundaries)) == pytest.approx(lowest, rel=1e-12, abs=1e-290)


def test_the_example_of_the_docstring() -> None:
    assert partition([3, 1, 4, 1, 5, 9, 2, 6], 3) == (4, 6)


def test_two_per_cent_are_given_for_fewer_bytes() -> None:
    costs, crossings = [50.0, 1.0, 50.0, 1.0], [0.0, 8e6, 1e3, 9e6]
    assert partition(costs, 2) == (2,)
    assert partition([50.5, 0.5, 1.0, 50.0], 2, crossings=[0, 8, 8, 1]) == (3,)
    assert partition([50.0, 4.0, 46.0], 2, crossings=[0, 8, 1]) == (1,), "8 % worse is too much"
    assert partition(costs, 2, crossings=crossings) == (2,)


def test_spare_parts_are_not_wasted_on_crumbs() -> None:
    """One dear item sets the optimum; the other cuts still share the rest evenly, cheap crossings or not."""
    costs, crossings = [100.0] + [10.0] * 9, [0.0] + [9.0] * 8 + [1.0]
    assert part_costs(costs, partition(costs, 4, crossings=crossings)) == [100.0, 30.0, 30.0, 30.0]


def test_many_items_are_quick_and_exact() -> None:
    costs = [1.0 + (n * 7919 % 101) / 101 for n in range(2000)]
    boundaries = partition(costs, 64, crossings=[float(n * 31 % 97) for n in range(2000)])
    assert len(boundaries) == 63
    assert max(part_costs(costs, boundaries)) <= largest_part(costs, 64) * 1.02 * (1 + 1e-12)


@pytest.mark.parametrize("num_parts", [0, 4])
def test_wrong_number_of_parts(num_parts: int) -> None:
    with pytest.raises(CutError, match=rf"cannot make {num_parts} parts of 3 items; ask for 1 to 3"):
        partition([1, 2, 3], num_parts)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_wrong_costs(bad: float) -> None:
    with pytest.raises(CutError, match="finite and not negative"):
        partition([1.0, bad], 1)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(2, 4))
def test_auto_is_the_smallest_number_that_leaves_slack(costs: list[int], num_workers: int) -> None:
    most = min(4 * num_workers, len(costs))
    lowest = {n: min(max(part_costs(costs, c)) for c in all_partitions(len(costs), n)) for n in range(1, most + 1)}
    enough = [n for n, cost in lowest.items() if cost <= sum(costs) / (2 * num_workers)]
    no_better = [n for n, cost in lowest.items() if cost == lowest[most]]
    assert auto_num_stages(costs, num_workers) == (enough or no_better)[0]


def test_auto_by_hand() -> None:
    assert auto_num_stages([1.0] * 100, 1) == 1, "one worker runs nothing in parallel"
    assert auto_num_stages([1.0] * 100, 2) == 4
    assert auto_num_stages([90.0] + [1.0] * 10, 2) == 2, "more stages than two cannot get below the dear item"
    assert auto_num_stages([1.0] * 7, 16) == 7
    with pytest.raises(CutError, match="num_workers = 0"):
        auto_num_stages([1.0], 0)


def test_balanced_never_begins_at_a_forbidden_item() -> None:
    costs = [1.0] * 8
    assert balanced(costs, [0.0] * 8, 2, num_workers=2) == (4,)
    assert balanced(costs, [0.0] * 8, 2, num_workers=2, forbidden={3, 4}) == (5,)
    with pytest.raises(CutError, match=r"has 3 places where a stage can begin, too few for num_stages = 4"):
        balanced(costs, [0.0] * 8, 4, num_workers=2, forbidden={1, 2, 4, 5, 6})
