"""Sources that FFmpeg opens: files that end, and live ones (cameras, networks) that are reached again when lost."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sidestream.errors import SourceError
from sidestream.types import Frame
from sidestream.video.decode import Decoder, Opening, Picture
from sidestream.video.policy import WAKE_SECONDS
from sidestream.video.source_kind import Source, camera_device, source_kind
from sidestream.video.sources import StreamInfo, StreamOptions
from sidestream.video.timeline import Timeline

LOG = logging.getLogger("sidestream.video")
MAX_BACKOFF_SECONDS = 8.0
DEFAULT_PERIOD_SECONDS = 1 / 25
SLACK_FRAMES, SLACK_SHARE = 2, 0.02
"""A file may hold so many frames fewer than its header says, the larger of both, before it is taken for cut off."""


def backoff_seconds(attempt: int, first_seconds: float = 0.5) -> float:
    """Wait before attempt 0, 1, 2 ...: doubles from ``first_seconds`` up to 8 s."""
    return min(first_seconds * 2**attempt, MAX_BACKOFF_SECONDS)


class MediaSource:
    """A file, camera or network stream. Live ones reconnect with back-off; files can start again (``loop``)."""

    def __init__(self, source: Source, frame_rate: float | None, loop: bool, options: StreamOptions) -> None:
        self.num_reconnects = 0
        self._kind, self._options, self._loop = source_kind(source), options, loop
        self._name, self._opening = opening_of(source, frame_rate, options)
        self._stopped = False
        self._num_corrupt_before = 0
        self._last_raw_seconds: float | None = None
        self._was_read = False
        self._decoder, self._first, self._rest = open_media(self._name, self._opening)
        is_live = self._kind == "camera" or (self._kind == "network" and not self._decoder.is_remote_file)
        rate = frame_rate or self._decoder.frame_rate
        self._forced_rate = None if is_live else frame_rate
        self._timeline = Timeline(1 / rate if rate else DEFAULT_PERIOD_SECONDS)
        height, width = (int(n) for n in self._first.rgb_HWC.shape[:2])
        duration = None if is_live or loop else self._decoder.duration_seconds
        self.info = StreamInfo(str(source), width, height, rate, is_live, duration)

    @property
    def num_corrupt_packets(self) -> int:
        return self._num_corrupt_before + self._decoder.num_corrupt_packets

    def frames(self) -> Iterator[Frame]:
        index = 0
        while True:
            for picture in self._one_connection():
                yield self._place(picture, index)
                index += 1
                if self._stopped:
                    return
            self._warn_if_cut_off(index)
            if not self._again():
                return

    def stop(self) -> None:
        self._stopped = True

    def close(self) -> None:
        self._decoder.close()

    def _one_connection(self) -> Iterator[Picture]:
        yield self._first
        yield from self._rest

    def _place(self, picture: Picture, index: int) -> Frame:
        self._last_raw_seconds = picture.raw_seconds
        if self._forced_rate:
            return Frame(picture.rgb_HWC, index, index / self._forced_rate)
        return Frame(picture.rgb_HWC, index, self._timeline.place(picture.raw_seconds))

    def _again(self) -> bool:
        """Start again after the end, where that is wanted; False ends the stream."""
        if self._stopped:
            return False
        if self.info.is_live:
            return self._reconnect()
        if self._decoder.failure is not None and self._decoder.is_remote_file:
            return self._reconnect() and self._pass_over_seen()
        if self._decoder.failure is not None:
            LOG.warning("%s ended early: %s", self._name, self._decoder.failure)
        if not self._loop:
            return False
        self._replace_decoder(open_media(self._name, self._opening))
        self._timeline.restart()
        return True

    def _warn_if_cut_off(self, num_frames: int) -> None:
        """After the last frame of a file. Both the count of frames and their times must fall short of the header:
        edit lists leave frames out without an early end, and a broken stretch in the middle is counted elsewhere."""
        stated, duration = self._decoder.num_frames_stated, self._decoder.duration_seconds
        was_read_before, self._was_read = self._was_read, True
        if was_read_before or self._stopped or self._decoder.failure is not None or not stated or not duration:
            return
        first, last, rate = self._first.raw_seconds, self._last_raw_seconds, self._decoder.frame_rate
        if not self._opening.is_path or not Path(self._name).is_file() or first is None or last is None or not rate:
            return
        lost_seconds = duration - (last - first + 1 / rate)
        is_short = stated - num_frames > max(SLACK_FRAMES, SLACK_SHARE * stated)
        if is_short and lost_seconds > max(SLACK_FRAMES / rate, SLACK_SHARE * duration):
            LOG.warning(
                "%s: the file says %d frames, %d could be read; it may be cut off", self._name, stated, num_frames
            )

    def _reconnect(self) -> bool:
        lost_at_seconds = time.monotonic()
        reason = self._decoder.failure or "it ended"
        self._decoder.close()
        for attempt in range(self._options.max_reconnects):
            wait_seconds = backoff_seconds(attempt, self._options.first_backoff_seconds)
            LOG.warning(
                "%s dropped out (%s); attempt %d of %d to reconnect in %.1f s",
                self._name, reason, attempt + 1, self._options.max_reconnects, wait_seconds,
            )  # fmt: skip
            if not self._sleep(wait_seconds):
                return False
            try:
                self._replace_decoder(open_media(self._name, self._opening))
            except SourceError as error:
                reason = error
                continue
            self.num_reconnects += 1
            if self.info.is_live:
                self._timeline.restart(time.monotonic() - lost_at_seconds)
            LOG.warning("%s is back", self._name)
            return True
        LOG.warning("%s is gone for good after %d attempts; the stream ends", self._name, self._options.max_reconnects)
        return False

    def _sleep(self, seconds: float) -> bool:
        """Wait; False as soon as it is to stop (a plain flag, looked at often: see ``FrameSource.stop``)."""
        until_seconds = time.monotonic() + seconds
        while not self._stopped and (left_seconds := until_seconds - time.monotonic()) > 0:
            time.sleep(min(left_seconds, WAKE_SECONDS))
        return not self._stopped

    def _pass_over_seen(self) -> bool:
        """In a file opened again, go to the first picture that has not been given yet; False where there is none."""
        last_seconds = self._last_raw_seconds
        picture: Picture | None = self._first
        while picture is not None:
            if last_seconds is None or picture.raw_seconds is None or picture.raw_seconds > last_seconds:
                self._first = picture
                return True
            picture = next(self._rest, None)
        return False

    def _replace_decoder(self, opened: tuple[Decoder, Picture, Iterator[Picture]]) -> None:
        self._num_corrupt_before += self._decoder.num_corrupt_packets
        self._decoder.close()
        self._decoder, self._first, self._rest = opened


def open_media(name: str, opening: Opening) -> tuple[Decoder, Picture, Iterator[Picture]]:
    """A decoder, its first picture and the pictures behind it.

    Raises:
        SourceError: it cannot be opened, or not one frame can be decoded.
    """
    decoder = Decoder(name, opening)
    pictures = iter(decoder)
    first = next(pictures, None)
    if first is None:
        decoder.close()
        why = f" ({decoder.failure})" if decoder.failure else ""
        raise SourceError(
            f"{name} holds no frame that can be decoded{why}; it is empty or damaged: make or copy it again"
        )
    return decoder, first, pictures


def opening_of(source: Source, frame_rate: float | None, options: StreamOptions) -> tuple[str, Opening]:
    """What FFmpeg is asked to open for a source, and how. Pure, but for a look at the size of a file."""
    build: dict[str, Callable[..., tuple[str, Opening]]] = {"camera": _camera, "network": _network, "file": _file}
    return build[source_kind(source)](source, frame_rate, options)


def _camera(source: Source, frame_rate: float | None, options: StreamOptions) -> tuple[str, Opening]:
    wanted = dict(options.ffmpeg_options)
    if options.camera_size_px is not None:
        height, width = options.camera_size_px
        wanted["video_size"] = f"{width}x{height}"
    if frame_rate is not None:
        wanted["framerate"] = f"{frame_rate:g}"
    timeouts = (options.open_timeout_seconds, options.read_timeout_seconds)
    return camera_device(source), Opening("v4l2", timeouts, wanted, options.decode_threads)


def _network(source: Source, frame_rate: float | None, options: StreamOptions) -> tuple[str, Opening]:
    wanted = dict(options.ffmpeg_options)
    if str(source).lower().startswith("rtsp"):
        wanted.setdefault("rtsp_transport", "tcp")
    if "listen" in wanted.get("rtsp_flags", ""):  # FFmpeg's own default is a number that FFmpeg refuses
        wanted.setdefault("listen_timeout", str(math.ceil(options.open_timeout_seconds)))
    timeouts = (options.open_timeout_seconds, options.read_timeout_seconds)
    return str(source), Opening(None, timeouts, wanted, options.decode_threads)


def _file(source: Source, frame_rate: float | None, options: StreamOptions) -> tuple[str, Opening]:
    path = Path(str(source))
    if path.is_file() and path.stat().st_size == 0:
        raise SourceError(f"{path} is empty (0 bytes); make or copy it again")
    return str(path), Opening(None, None, options.ffmpeg_options, options.decode_threads, is_path=True)
