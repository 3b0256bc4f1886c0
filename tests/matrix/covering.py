"""Rows in which every pair of members of two axes comes together at least once: far fewer than the whole product."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product

Row = tuple[str, ...]
Pair = tuple[tuple[int, str], tuple[int, str]]
"""Two members, each with the number of its axis."""


def covering_rows(axes: Mapping[str, Sequence[str]], is_possible: Callable[[Row], bool]) -> list[Row]:
    """Greedy: the row that brings most pairs which have not been yet, and of several such rows the first.

    Rows are in the order of the product, so members that come first in their axis are taken where there is a choice:
    the quick ones. A pair that is in no possible row is left out. The same axes give the same rows, always.
    """
    rows = [row for row in product(*axes.values()) if is_possible(row)]
    missing = {pair for row in rows for pair in pairs_of(row)}
    taken: list[Row] = []
    while missing:
        best = max(rows, key=lambda row: sum(pair in missing for pair in pairs_of(row)))  # the first of the best
        taken.append(best)
        missing.difference_update(pairs_of(best))
    return sorted(taken, key=rows.index)


def pairs_of(row: Row) -> list[Pair]:
    """All pairs of members in a row."""
    return list(combinations(enumerate(row), 2))
