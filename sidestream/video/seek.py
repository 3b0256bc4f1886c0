"""Frames from a given moment on, without decoding everything before it; ``frame_at`` for a single one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import av

from sidestream.errors import InputError, SourceError
from sidestream.types import Frame
from sidestream.video.decode import Decoder, Picture
from sidestream.video.media_source import DEFAULT_PERIOD_SECONDS, open_media, opening_of
from sidestream.video.source_kind import Source, source_kind
from sidestream.video.sources import StreamOptions
from sidestream.video.timeline import Timeline

MARGINS_SECONDS = (0.0, 2.0, 10.0)
"""How far before the moment to ask for a key frame: the first that gives one at or before it is used."""

SEEKABLE_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "flv", "mpegts")
"""Containers with a time stamp for every frame. Others (MPEG program streams, bare H.264) are read from the start."""


def frame_at(path: str | os.PathLike[str], pts_seconds: float) -> Frame:
    """The frame on the screen at that time: the last one with a time at or before ``pts_seconds``.

    Found by going to a key frame before it and decoding on from there; the same pixels as a full decode gives.

    Raises:
        InputError: a negative time.
        SourceError: the file cannot be opened, or holds no frame.
    """
    if not pts_seconds >= 0:
        raise InputError(f"{pts_seconds = } is before the first frame, which is at 0; give 0 or more")
    shown = None
    for picture, seconds, start, steps in numbered_pictures_from(path, pts_seconds):
        if shown is not None and seconds > pts_seconds:
            break
        shown = picture, seconds, start, steps
    if shown is None:
        raise SourceError(f"{path} holds no frame at {pts_seconds} s; it is damaged there: make or copy it again")
    picture, seconds, start, steps = shown
    return Frame(picture.rgb_HWC, (_index_of(str(path), start) if start else 0) + steps, seconds)


def pictures_from(path: Source, start_seconds: float) -> Iterator[tuple[Picture, float]]:
    """Pictures and their times in order, from the one shown at ``start_seconds``, or an earlier one, to the end."""
    return ((picture, seconds) for picture, seconds, _, _ in numbered_pictures_from(path, start_seconds))


def numbered_pictures_from(path: Source, start_seconds: float) -> Iterator[tuple[Picture, float, Picture | None, int]]:
    """``pictures_from`` with where it started (a key frame, None for the file's start) and the steps from there."""
    if source_kind(path) != "file":
        raise SourceError(f"{path} is a {source_kind(path)}, not a file; only files can be addressed by time")
    name, opening = opening_of(path, None, StreamOptions())
    decoder, first, rest = open_media(name, opening)
    period = 1 / decoder.frame_rate if decoder.frame_rate else DEFAULT_PERIOD_SECONDS
    try:
        if start_seconds > 0 and first.raw_seconds is not None:
            jumped = _jump(decoder, first.raw_seconds, start_seconds)
            if jumped is not None:
                onward = _timed(*jumped, Timeline(period, first.raw_seconds))
                yield from ((picture, seconds, jumped[0], steps) for steps, (picture, seconds) in enumerate(onward))
                return
            decoder.close()
            decoder, first, rest = open_media(name, opening)
        onward = _timed(first, rest, Timeline(period))
        yield from ((picture, seconds, None, steps) for steps, (picture, seconds) in enumerate(onward))
    finally:
        decoder.close()


def _timed(first: Picture, rest: Iterator[Picture], timeline: Timeline) -> Iterator[tuple[Picture, float]]:
    yield first, timeline.place(first.raw_seconds)
    for picture in rest:
        yield picture, timeline.place(picture.raw_seconds)


def _jump(decoder: Decoder, origin_seconds: float, start_seconds: float) -> tuple[Picture, Iterator[Picture]] | None:
    """Stand on a key frame at or before the moment; None where that cannot be done.

    Frames that come out before the first key frame may lean on pictures that were never decoded: they are not used.
    """
    if decoder.container.format.name not in SEEKABLE_FORMATS:
        return None
    for margin in MARGINS_SECONDS:
        if start_seconds - margin <= 0 or not decoder.seek(origin_seconds + start_seconds - margin):
            return None
        pictures = iter(decoder)
        for picture in pictures:
            if picture.raw_seconds is None:
                return None
            if picture.is_key and not picture.is_broken:
                if origin_seconds <= picture.raw_seconds <= origin_seconds + start_seconds:
                    return picture, pictures
                break
    return None


def _index_of(path: str, shown: Picture) -> int:
    """The number of a frame: how many packets of the file come between the first frame and it. No decoding."""
    first, _ = next(pictures_from(path, 0.0))
    if shown.raw_seconds is None or first.raw_seconds is None:
        return 0
    earlier = 0
    try:
        with av.open(f"file:{path}", metadata_errors="replace") as container:
            stream = container.streams.video[0]
            half_tick = float(stream.time_base or 0) / 2
            for packet in container.demux(stream):
                ticks = packet.dts if shown.by_dts else packet.pts
                if packet.size and ticks is not None and not packet.is_discard:
                    seconds = float(ticks * packet.time_base) + half_tick
                    earlier += first.raw_seconds < seconds < shown.raw_seconds
    except (av.FFmpegError, OSError):
        pass
    return earlier
