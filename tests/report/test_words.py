"""Numbers before nouns."""

from __future__ import annotations

import pytest

from sidestream.report.words import counted, ordinal


@pytest.mark.parametrize(("number", "text"), [(0, "0 stages"), (1, "1 stage"), (2, "2 stages")])
def test_one_has_no_plural(number: int, text: str) -> None:
    assert counted(number, "stage") == text


def test_ordinals() -> None:
    words = {1: "1st", 2: "2nd", 3: "3rd", 4: "4th", 11: "11th", 12: "12th", 13: "13th", 21: "21st", 102: "102nd"}
    assert {number: ordinal(number) for number in words} == words
