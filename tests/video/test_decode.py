"""``StampChoice``: which time stamps are believed, on rows of stamps written out by hand."""

from __future__ import annotations

import pytest

from sidestream.video.decode import StampChoice

PTS, DTS = False, True
Stamps = list[int | None]


@pytest.mark.parametrize(
    ("container", "pts", "dts", "believed"),
    [
        ("mp4", [0, 1, 2, 3], [0, 1, 2, 3], [PTS] * 4),
        ("mp4", [0, 2, 1, 3], [0, 1, 2, 3], [PTS, PTS, DTS, DTS]),  # falls back
        ("mp4", [0, 1, 1, 2], [0, 1, 2, 3], [PTS, PTS, DTS, DTS]),  # twice the same one is no order either
        ("mp4", [0, 1, 1, 2], [0, 1, 1, 2], [PTS] * 4),  # the others do no better
        ("mp4", [0, 1, 1, 2], [0, 0, 0, 0], [PTS] * 4),
        ("mp4", [0, 1, 1, 2], [None] * 4, [PTS] * 4),
        ("mp4", [None] * 3, [0, 1, 2], [DTS] * 3),
        ("avi", [0, 1, 2, 3], [0, 1, 2, 3], [DTS] * 4),
        ("avi", [0, 1, 2, 3], [0, 0, 1, 1], [DTS, PTS, PTS, PTS]),  # as soon as presentation times do as well
    ],
)
def test_the_stamps_that_are_in_order_are_believed(
    container: str, pts: Stamps, dts: Stamps, believed: list[bool]
) -> None:
    choice = StampChoice(container)
    found = [choice.choose(p, d) for p, d in zip(pts, dts, strict=True)]
    assert found == [(d if by_dts else p, by_dts) for p, d, by_dts in zip(pts, dts, believed, strict=True)]


def test_without_a_stamp_there_is_none() -> None:
    assert StampChoice("mp4").choose(None, None) == (None, False)
