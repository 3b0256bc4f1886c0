"""One open FFmpeg input: its frames in presentation order, one per coded frame, broken packets skipped and counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
from torch import Tensor

from sidestream.errors import SourceError
from sidestream.video.pixels import Painter

MAX_PIXELS = 8192 * 8192
"""Frames larger than this are taken for a broken header."""
MAX_FAILURES_IN_A_ROW = 64
"""So many unreadable packets without one frame between them end the stream."""


@dataclass(frozen=True, slots=True)
class Opening:
    """How to open an input: what FFmpeg is told, and how long it may wait."""

    format: str | None = None
    timeout_seconds: tuple[float, float] | None = None
    ffmpeg_options: Mapping[str, str] = field(default_factory=dict)
    decode_threads: int = 1
    is_path: bool = False
    """The name is a path on disk: a colon in it is not the end of a protocol's name."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded frame before it has a place in a stream; ``raw_seconds`` is the container's own time stamp."""

    rgb_HWC: Tensor
    raw_seconds: float | None
    is_key: bool
    is_broken: bool
    by_dts: bool = False
    """The stamp is a decoding time, because this input's presentation times are not in order."""


class StampChoice:
    """Which time stamp of a decoded frame to believe: presentation (pts) or decoding (dts) time.

    Presentation times that fall back between frames in presentation order are wrong (AVI files with packed B-frames
    have such); then decoding times count as long as they do better. AVI stores no presentation times at all, so
    decoding times are believed first. Where the believed one is missing, there is no stamp.
    """

    def __init__(self, format_name: str) -> None:
        self._faulty = {"pts": int(format_name == "avi"), "dts": 0}
        self._last: dict[str, int] = {}

    def choose(self, pts: int | None, dts: int | None) -> tuple[int | None, bool]:
        """(the stamp, whether it is the decoding time)."""
        for kind, value in (("pts", pts), ("dts", dts)):
            if value is not None:
                self._faulty[kind] += value <= self._last.get(kind, value - 1)
                self._last[kind] = value
        pts_is_better = self._faulty["pts"] <= self._faulty["dts"]
        if pts is not None and (pts_is_better or "dts" not in self._last):
            return pts, False
        return dts, dts is not None


class Decoder:
    """An open input with one video stream. Iterate for ``Picture``; ``close`` when done.

    Raises:
        SourceError: the input cannot be opened or has no video stream.
    """

    def __init__(self, name: str, opening: Opening | None = None) -> None:
        self.name = name
        self.num_corrupt_packets = 0
        self.failure: Exception | None = None
        """Why the input ended early (a network that went away), None at an ordinary end."""
        self._paint = Painter()
        self._stamps = StampChoice("")
        self._container = _open(name, opening or Opening())
        if not self._container.streams.video:
            self._container.close()
            raise SourceError(f"{name} has no video stream (sound or subtitles only?); give a file with pictures")
        self._stream = self._container.streams.video[0]
        _set_up_codec(self._stream, name, opening or Opening())

    @property
    def container(self) -> Any:
        return self._container

    @property
    def frame_rate(self) -> float | None:
        """The nominal frame rate, None where the input states none that can be believed."""
        for rate in (self._stream.average_rate, self._stream.guessed_rate):
            if rate and Fraction(1, 1000) <= rate <= 1000:
                return float(rate)
        return None

    @property
    def duration_seconds(self) -> float | None:
        """What the header says of the length; live sources have none."""
        if self._stream.duration and self._stream.time_base and self._stream.duration > 0:
            return float(self._stream.duration * self._stream.time_base)
        duration = self._container.duration
        return duration / 1_000_000 if duration and duration > 0 else None

    @property
    def num_frames_stated(self) -> int | None:
        """What the header says of the number of frames, None where it says nothing. Good for a warning, no more."""
        return self._stream.frames if self._stream.frames > 0 else None

    @property
    def is_remote_file(self) -> bool:
        """A file behind an http address: it has a length, so its end is no drop-out, and it can be taken up again."""
        return self.name.lower().startswith("http") and self.duration_seconds is not None

    def seek(self, raw_seconds: float) -> bool:
        """Go to a key frame at or before a raw time stamp; False where the input cannot."""
        try:
            ticks = int(raw_seconds / self._stream.time_base)
            self._container.seek(ticks, stream=self._stream, backward=True, any_frame=False)
        except (av.FFmpegError, OverflowError, ValueError):
            return False
        return True

    def __iter__(self) -> Iterator[Picture]:
        """Every frame that can be decoded, from here to the end, in presentation order."""
        self._stamps = StampChoice(self._container.format.name)
        for packet in self._packets():
            for frame in self._frames(packet):
                yield self._picture(frame)

    def close(self) -> None:
        with contextlib.suppress(av.FFmpegError):
            self._container.close()

    def _packets(self) -> Iterator[Any]:
        """The packets of the video stream and then None, which asks the codec for the frames it still holds."""
        failures = 0
        while failures < MAX_FAILURES_IN_A_ROW:
            try:
                for packet in self._container.demux(self._stream):
                    if packet.size:
                        failures = 0
                        yield packet
                break
            except (av.error.EOFError, StopIteration):
                break
            except (av.error.InvalidDataError, av.error.PatchWelcomeError):
                self.num_corrupt_packets += 1
                failures += 1
            except (av.FFmpegError, OSError, ValueError) as failure:
                self.failure = failure
                break
        if self.failure is None or not self.is_remote_file:
            yield None

    def _frames(self, packet: Any) -> list[Any]:
        if packet is not None and packet.is_corrupt:
            self.num_corrupt_packets += 1
            return []
        try:
            return list(self._stream.codec_context.decode(packet))
        except av.error.EOFError:
            return []
        except (av.FFmpegError, ValueError, MemoryError):
            self.num_corrupt_packets += 1
            return []

    def _picture(self, frame: Any) -> Picture:
        if frame.is_corrupt:
            self.num_corrupt_packets += 1
        ticks, by_dts = self._stamps.choose(frame.pts, frame.dts)
        time_base = frame.time_base or self._stream.time_base
        stamp = None if ticks is None or not time_base else float(ticks * time_base)
        return Picture(self._paint(frame), stamp, bool(frame.key_frame), bool(frame.is_corrupt), by_dts)


def _open(name: str, opening: Opening) -> Any:
    try:
        return av.open(
            f"file:{name}" if opening.is_path else name,
            format=opening.format,
            options=dict(opening.ffmpeg_options),
            timeout=opening.timeout_seconds,
            metadata_errors="replace",
        )
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        raise SourceError(_why_not_open(name, error, opening.is_path)) from error


def _set_up_codec(stream: Any, name: str, opening: Opening) -> None:
    try:
        context = stream.codec_context
        context.thread_type = "NONE" if opening.decode_threads == 1 else "AUTO"
        context.thread_count = opening.decode_threads
        context.options = {**context.options, "max_pixels": str(MAX_PIXELS)}
    except (AttributeError, RuntimeError) as error:
        raise SourceError(
            f"{name} holds video that this FFmpeg cannot decode ({error}); convert it, e.g. to H.264"
        ) from error


def _why_not_open(name: str, error: Exception, is_path: bool) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    if isinstance(error, (FileNotFoundError, IsADirectoryError, PermissionError)):
        return f"cannot open {name}: {reason}; check the path and that it may be read"
    if isinstance(error, av.error.InvalidDataError) and not is_path:
        return f"cannot open {name}: it sent nothing in time that is video ({reason}); check what is sent there"
    if isinstance(error, av.error.InvalidDataError):
        return f"cannot open {name}: it is not a video, or it is cut short or damaged ({reason}); make or copy it again"
    if isinstance(error, TimeoutError | av.error.ExitError):
        return f"cannot open {name}: no answer in time ({reason}); check the address, or raise open_timeout_seconds"
    return f"cannot open {name}: {reason}; check the name and that the source is running"
