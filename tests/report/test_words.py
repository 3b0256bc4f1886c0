"""Numbers before nouns."""

from __future__ import annotations

import pytest

from sidestream.report.words import counted


@pytest.mark.parametrize(("number", "text"), [(0, "0 stages"), (1, "1 stage"), (2, "2 stages")])
def test_one_has_no_plural(number: int, text: str) -> None:
    assert counted(number, "stage") == text
