"""``ClipRecord``: one labelled stretch of video, by path and presentation time; and what a list of them must obey."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sidestream.errors import InputError


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """A stretch of a video and its class. Times count from the first frame of the file; the end is exclusive."""

    path: str
    """A video file, a GIF or a folder of images (or whatever the data set's own ``open_pictures`` reads)."""
    label: int
    start_seconds: float | None = None
    end_seconds: float | None = None
    key: str = ""
    """A name for reports, the same wherever the data lies; by default the path, and the stretch if it is one. Clips
    with one name count as clips of one record where accuracies are counted."""

    @property
    def name(self) -> str:
        return self.key or self.path + stretch_name(self.start_seconds, self.end_seconds)


def stretch_name(start_seconds: float | None, end_seconds: float | None) -> str:
    """For a stretch "@1.5-3", "@0-3" or "@1.5-end"; empty for all of a video."""
    if start_seconds is None and end_seconds is None:
        return ""
    return f"@{start_seconds or 0}-{'end' if end_seconds is None else end_seconds}"


def check_labels(records: Sequence[ClipRecord], num_classes: int, origin: str) -> None:
    """Raises ``InputError`` unless every label is one of 0 .. num_classes - 1."""
    wrong = [record for record in records if not 0 <= record.label < num_classes]
    if wrong:
        first = wrong[0]
        raise InputError(
            f"{origin}: the label of {first.name!r} is {first.label}, outside 0 to {num_classes - 1} "
            f"({len(wrong)} of {len(records)} records); number the classes from 0, or give the right num_classes"
        )


def check_stretch(record: ClipRecord) -> None:
    """Raises ``InputError`` for a stretch that holds no time."""
    start, end = record.start_seconds or 0.0, record.end_seconds
    if not start >= 0 or (end is not None and not end > start):
        raise InputError(
            f"{record.name!r}: start_seconds={record.start_seconds} and end_seconds={end} leave nothing; "
            "give 0 <= start < end, in seconds from the first frame"
        )
