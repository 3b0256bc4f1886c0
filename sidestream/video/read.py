"""``read``: a file, a folder of images or a GIF as one Clip in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from sidestream.errors import InputError, SourceError
from sidestream.types import Clip, Sound
from sidestream.video.media_source import DEFAULT_PERIOD_SECONDS, MediaSource
from sidestream.video.seek import pictures_from
from sidestream.video.sound import read_sound
from sidestream.video.source_kind import source_kind
from sidestream.video.sources import FolderSource, StreamOptions


def read(
    path: str | os.PathLike[str],
    *,
    start_seconds: float = 0.0,
    end_seconds: float | None = None,
    max_frames: int | None = None,
    with_sound: bool = False,
) -> Clip:
    """Read the frames with start_seconds <= pts < end_seconds: one per coded frame, upright, in presentation order.

    Windows that share a border share no frame. The whole stretch is held in memory: for long videos use ``stream``.

    Args:
        path: a video file, a GIF or a folder of images (25 a second).
        start_seconds, end_seconds: presentation times, from the first frame = 0; None reads to the end.
        max_frames: stop after so many.
        with_sound: bring the first sound stream along, at its own rate, cut to the same stretch.

    Returns:
        A Clip; its ``pts_seconds`` still count from the first frame of the file. ``sound`` is None without sound.

    Raises:
        SourceError: it cannot be opened, holds no frame, none in the stretch, or frames of several sizes.
        InputError: a stretch that ends before it starts.
    """
    if start_seconds < 0 or (end_seconds is not None and end_seconds <= start_seconds):
        raise InputError(f"{start_seconds = } and {end_seconds = } leave nothing; give 0 <= start < end")
    if max_frames is not None and max_frames < 1:
        raise InputError(f"{max_frames = }; give 1 or more, or None for all")
    if source_kind(path) not in ("file", "folder"):
        raise InputError(f"{path} is a {source_kind(path)}, which has no end to read to; use stream({str(path)!r})")
    window = _Window(path, start_seconds, end_seconds)
    pictures: list[Tensor] = []
    times: list[float] = []
    for rgb_HWC, seconds in window:
        if pictures and rgb_HWC.shape != pictures[0].shape:
            sizes = f"{tuple(pictures[0].shape[:2])} to {tuple(rgb_HWC.shape[:2])}"
            raise SourceError(f"{path} changes its size from {sizes} at {seconds:.3f} s; use stream, frame by frame")
        pictures.append(rgb_HWC)
        times.append(seconds)
        if len(pictures) == max_frames:
            break
    if not pictures:
        raise SourceError(
            f"{path} has no frame from {start_seconds} to {end_seconds} s; its last is at {window.last:.3f} s"
        )
    sound = _sound(path, window, times, len(times) == max_frames) if with_sound else None
    return Clip(torch.stack(pictures), tuple(times), sound, window.num_corrupt_packets)


class _Window:
    """Iterates over (rgb_HWC, seconds) inside the stretch, and remembers what came along with it."""

    def __init__(self, path: str | os.PathLike[str], start_seconds: float, end_seconds: float | None) -> None:
        self.path, self.start_seconds, self.end_seconds = path, start_seconds, end_seconds
        self.last = 0.0
        self.num_corrupt_packets = 0

    def __iter__(self) -> Iterator[tuple[Tensor, float]]:
        for rgb_HWC, seconds in self._pictures():
            self.last = seconds
            if self.end_seconds is not None and seconds >= self.end_seconds:
                return
            if seconds >= self.start_seconds:
                yield rgb_HWC, seconds

    def _pictures(self) -> Iterator[tuple[Tensor, float]]:
        if self.start_seconds > 0 and source_kind(self.path) == "file":
            for picture, seconds in pictures_from(self.path, self.start_seconds):
                self.num_corrupt_packets += picture.is_broken
                yield picture.rgb_HWC, seconds
            return
        source: FolderSource | MediaSource
        if source_kind(self.path) == "folder":
            source = FolderSource(self.path, None, False)
        else:
            source = MediaSource(self.path, None, False, StreamOptions())
        try:
            for frame in source.frames():
                yield frame.rgb_HWC, frame.pts_seconds
                self.num_corrupt_packets = source.num_corrupt_packets
            self.num_corrupt_packets = source.num_corrupt_packets
        finally:
            source.close()


def _sound(path: str | os.PathLike[str], window: _Window, times: list[float], cut_short: bool) -> Sound | None:
    """The sound of the same stretch; where ``max_frames`` cut it short, to one frame period after the last frame."""
    if source_kind(path) != "file":
        return None
    picture, _ = next(pictures_from(path, 0.0))
    until_seconds = window.end_seconds
    if until_seconds is None and cut_short:
        period = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else DEFAULT_PERIOD_SECONDS
        until_seconds = times[-1] + period
    return read_sound(f"file:{path}", picture.raw_seconds or 0.0, window.start_seconds, until_seconds)
