"""``stream``: frames from any source, one by one, under a policy and on a clock."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from sidestream.clock import WALL, Clock, WallClock
from sidestream.errors import InputError
from sidestream.types import Frame
from sidestream.video.media_source import MediaSource
from sidestream.video.policy import Mailbox, Policy, parse_policy
from sidestream.video.source_kind import Source, source_kind
from sidestream.video.sources import FolderSource, FrameSource, StreamInfo, StreamOptions, SyntheticSource

CLOSE_WAIT_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class StreamStats:
    """What a stream has done so far."""

    num_frames: int
    """Frames handed out."""
    num_dropped: int
    """Frames that the policy threw away because a newer one had come."""
    num_corrupt_packets: int
    """Packets that could not be decoded, or of which the decoder had to guess a part."""
    num_reconnects: int


def stream(
    source: Source,
    *,
    policy: str | None = None,
    real_time: bool = False,
    clock: Clock = WALL,
    max_frames: int | None = None,
    frame_rate: float | None = None,
    loop: bool = False,
    **options: Any,
) -> Stream:
    """Open a source and give its frames one by one.

    Args:
        source: a file, a folder of images, a camera ("camera:0", "/dev/video0", 0), a network address
            ("rtsp://", "http://", "udp://", "tcp://", "rtp://") or "synthetic[:key=value,...]".
        policy: "newest" (only the newest frame waits, older ones are dropped and counted; default for live
            sources and for ``real_time``), "lossless" (default for files) or "bounded:N".
        real_time: replay at the presentation times, as if live; ``arrived_at_seconds`` is when a frame was due.
        clock: where those times come from.
        max_frames: stop after so many frames.
        frame_rate: of a folder (default 25) or the synthetic source; for a file it replaces the recorded times;
            a camera is asked for it.
        loop: start again at the end, without end.
        options: see ``StreamOptions``.

    Raises:
        SourceError: it cannot be opened, or holds no frame; the message names it.
        InputError: a policy or option that does not exist.
    """
    if frame_rate is not None and not 0 < frame_rate <= 10_000:
        raise InputError(f"frame_rate is {frame_rate}; give frames per second, above 0")
    if max_frames is not None and max_frames < 1:
        raise InputError(f"max_frames is {max_frames}; give a number of frames, 1 or more")
    wanted = None if policy is None else parse_policy(policy)
    opened = open_source(source, frame_rate, loop, StreamOptions.of(options))
    if wanted is None:
        wanted = parse_policy("newest" if opened.info.is_live or real_time else "lossless")
    return Stream(opened, wanted, real_time=real_time and not opened.info.is_live, clock=clock, max_frames=max_frames)


def open_source(source: Source, frame_rate: float | None, loop: bool, options: StreamOptions) -> FrameSource:
    """The open source for a name; see ``source_kind``."""
    kind = source_kind(source)
    if kind == "folder":
        return FolderSource(source, frame_rate, loop)
    if kind == "synthetic":
        return SyntheticSource(source, frame_rate, loop)
    return MediaSource(source, frame_rate, loop, options)


class Stream:
    """An iterator of ``Frame`` and a context manager; made by ``stream``.

    "lossless" pulls: a frame is decoded when it is asked for, so memory is bounded. The other policies read ahead in
    a thread of their own and keep the newest frames. A replay on a clock that is not the wall clock is simulated
    without a thread, so that it gives the same frames every time.
    """

    def __init__(
        self, source: FrameSource, policy: Policy, *, real_time: bool, clock: Clock, max_frames: int | None
    ) -> None:
        self.info: StreamInfo = source.info
        self.policy = policy
        self._source, self._clock, self._real_time, self._max_frames = source, clock, real_time, max_frames
        self._num_frames, self._num_skipped, self._closed = 0, 0, False
        self._mailbox = Mailbox(policy.capacity) if policy.capacity else None
        self._thread: threading.Thread | None = None
        self._pulled: Iterator[Frame] | None = None
        if self._mailbox and self.info.is_live:
            self._start_thread()

    @property
    def stats(self) -> StreamStats:
        dropped = self._num_skipped + (self._mailbox.num_dropped if self._mailbox else 0)
        return StreamStats(self._num_frames, dropped, self._source.num_corrupt_packets, self._source.num_reconnects)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Frame:
        if self._closed or self._num_frames == self._max_frames:
            self.close()
            raise StopIteration
        frame = self._take()
        if frame is None:
            self.close()
            raise StopIteration
        self._num_frames += 1
        return frame

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def close(self) -> None:
        """Let go of the source; may be called twice. Does not wait for a network that is silent."""
        if self._closed:
            return
        self._closed = True
        self._source.stop()
        if self._thread is None:
            self._pulled = None
            self._source.close()
        elif self._thread is not threading.current_thread():
            self._thread.join(CLOSE_WAIT_SECONDS)  # the thread closes the source itself

    def _take(self) -> Frame | None:
        if self._mailbox is None:
            return next(self._frames_pulled(), None)
        if self._real_time and not isinstance(self._clock, WallClock):
            return next(self._frames_pulled(), None)
        if self._thread is None:
            self._start_thread()
        return self._mailbox.get()

    def _frames_pulled(self) -> Iterator[Frame]:
        if self._pulled is None:
            if not self._real_time:
                self._pulled = (self._arrived(frame) for frame in self._source.frames())
            elif self.policy.capacity is None:
                self._pulled = due_frames(self._source.frames(), self._clock)
            else:
                self._pulled = self._simulated(self.policy.capacity)
        return self._pulled

    def _arrived(self, frame: Frame) -> Frame:
        return dataclasses.replace(frame, arrived_at_seconds=self._clock.now())

    def _simulated(self, capacity: int) -> Iterator[Frame]:
        """What the reader thread would have kept, worked out from the clock when the next frame is asked for."""
        waiting: list[Frame] = []
        upcoming = timed(self._source.frames(), self._clock)
        following = next(upcoming, None)
        while following is not None or waiting:
            while following is not None and (not waiting or following.arrived_at_seconds <= self._clock.now()):
                self._clock.sleep_until(following.arrived_at_seconds)
                waiting.append(following)
                following = next(upcoming, None)
            self._num_skipped += max(0, len(waiting) - capacity)
            waiting = waiting[-capacity:]
            yield waiting.pop(0)

    def _start_thread(self) -> None:
        mailbox, source = self._mailbox, self._source
        if mailbox is None:
            return
        frames = due_frames(source.frames(), self._clock) if self._real_time else None
        self._thread = threading.Thread(
            target=_fill, args=(mailbox, source, frames, self._clock), name="sidestream-reader", daemon=True
        )
        self._thread.start()


def timed(frames: Iterator[Frame], clock: Clock) -> Iterator[Frame]:
    """Frames with ``arrived_at_seconds`` set to when they are due, the first one now."""
    start_seconds: float | None = None
    for frame in frames:
        if start_seconds is None:
            start_seconds = clock.now() - frame.pts_seconds
        yield dataclasses.replace(frame, arrived_at_seconds=start_seconds + frame.pts_seconds)


def due_frames(frames: Iterator[Frame], clock: Clock) -> Iterator[Frame]:
    """``timed`` frames, each given when it is due."""
    for frame in timed(frames, clock):
        clock.sleep_until(frame.arrived_at_seconds)
        yield frame


def _fill(mailbox: Mailbox, source: FrameSource, due: Iterator[Frame] | None, clock: Clock) -> None:
    """The reader thread: every frame into the mailbox, then the source is closed."""
    try:
        for frame in due if due is not None else source.frames():
            mailbox.put(frame if due is not None else dataclasses.replace(frame, arrived_at_seconds=clock.now()))
        mailbox.finish()
    except BaseException as error:
        mailbox.finish(error)
    finally:
        source.close()
