"""Top-1: the share of answers whose best class is the true one."""

from __future__ import annotations

from collections.abc import Sequence

from sidestream.errors import InputError


def top_1(answers: Sequence[int | None], labels: Sequence[int]) -> float:
    """``answers``: the best class of each; None where there was no answer, which is wrong. Result 0 to 1."""
    if not labels or len(answers) != len(labels):
        raise InputError(f"{len(answers)} answers for {len(labels)} labels; give one for each, and at least one")
    return sum(answer == label for answer, label in zip(answers, labels, strict=True)) / len(labels)
