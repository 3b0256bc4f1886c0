"""``stream``: frames from any source, one by one, under a policy and on a clock."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from sidestream.clock import WALL, Clock, WallClock
from sidestream.errors import InputError
from sidestream.types import Frame
from sidestream.video.media_source import MediaSource
from sidestream.video.policy import Mailbox, Policy, StopFlag, parse_policy
from sidestream.video.replay import SimulatedReplay, arriving, due_frames
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

    Threads: ``stop`` and ``close`` may be called from any thread, and from a signal handler, while another one is
    inside ``next``. Whoever works inside the source closes it: the reader thread, or the thread that pulls.
    """

    def __init__(
        self, source: FrameSource, policy: Policy, *, real_time: bool, clock: Clock, max_frames: int | None
    ) -> None:
        self.info: StreamInfo = source.info
        self.policy = policy
        self._source, self._clock, self._real_time, self._max_frames = source, clock, real_time, max_frames
        self._num_frames = 0
        self._stopped = StopFlag()
        self._working = threading.Lock()
        """Held by who is inside the source, or starts the thread that will be; ``close`` never waits for it."""
        self._source_is_closed = False
        self._thread: threading.Thread | None = None
        self._mailbox = Mailbox(policy.capacity, self._stopped) if policy.capacity else None
        self._simulated: SimulatedReplay | None = None
        self._pulled: Iterator[Frame] | None = None
        if self._mailbox is None:
            self._pulled = self._arriving_frames()
        elif real_time and not isinstance(clock, WallClock):
            self._simulated = SimulatedReplay(source.frames(), self._mailbox, clock)
        elif self.info.is_live:
            self._thread = self._started_thread(self._mailbox)

    @property
    def stats(self) -> StreamStats:
        num_dropped = self._mailbox.num_dropped if self._mailbox else 0
        return StreamStats(self._num_frames, num_dropped, self._source.num_corrupt_packets, self._source.num_reconnects)

    @property
    def wants_latency(self) -> bool:
        """True where frames come at their own pace, live or replayed in real time: an answer should follow soon."""
        return self.info.is_live or self._real_time

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Frame:
        frame = None
        try:
            if not self._stopped.is_set and self._num_frames != self._max_frames:
                frame = self._take()
        finally:
            if self._stopped.is_set:  # maybe while we were inside the source, so that nobody else could close it
                self._release(wait_seconds=0.0)
        if frame is None and not self._stopped.is_set:
            self.close()
        if frame is None or self._stopped.is_set:
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
            self.stop()
            self._release(wait_seconds=0.0)

    def catch_up(self) -> None:
        """Go on from now: throw away the frames that wait, and count dropped frames from zero.

        For a source that was opened some time before its first frame is wanted. What a live source sent since then is
        neither given nor counted as dropped; ``index`` shows the gap. Nothing waits in a file before the first frame
        is taken. A live source under "lossless" keeps what it has: nobody but the system holds its frames.
        """
        if self._mailbox is None:
            return
        with self._working:
            if self._simulated is not None and not self._stopped.is_set:
                self._simulated.put_due()
            self._mailbox.flush()

    def stop(self) -> None:
        """End soon: no more frames are given, waiting ones included. Only sets flags; ``close`` lets go of the source.

        For any thread and for signal handlers. Whoever waits in ``next`` gets StopIteration within 0.2 s, and a wait
        before a reconnect ends as soon. Two waits inside FFmpeg cannot be cut short (PyAV's interrupt knows
        only time): a pull ("lossless") ends with the next frame or after ``read_timeout_seconds``, and an attempt to
        reconnect after ``open_timeout_seconds``.
        """
        self._stopped.is_set = True
        self._source.stop()

    def close(self) -> None:
        """Stop, and let go of the source; may be called twice. Waits at most 2 s.

        Where a thread is still inside a source that is silent, the source is closed by that thread when it comes back.
        """
        self.stop()
        self._release(wait_seconds=CLOSE_WAIT_SECONDS)

    def _release(self, wait_seconds: float) -> None:
        """Close the source, unless somebody is inside; they look at ``_stopped`` when they come out, and call this."""
        if self._working.acquire(blocking=False):
            try:
                if self._thread is None and not self._source_is_closed:
                    self._source_is_closed = True
                    self._pulled = self._simulated = None
                    self._source.close()
            finally:
                self._working.release()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(wait_seconds)  # the reader thread closes the source itself

    def _take(self) -> Frame | None:
        """The next frame, None at the end."""
        with self._working:
            if self._stopped.is_set:
                return None
            if self._mailbox is None:
                return next(self._pulled, None) if self._pulled is not None else None
            if self._simulated is not None:
                self._simulated.put_next()
            elif self._thread is None:
                self._thread = self._started_thread(self._mailbox)
        return self._mailbox.get()

    def _arriving_frames(self) -> Iterator[Frame]:
        if self._real_time:
            return due_frames(self._source.frames(), self._clock, self._stopped)
        return arriving(self._source.frames(), self._clock)

    def _started_thread(self, mailbox: Mailbox) -> threading.Thread:
        thread = threading.Thread(
            target=_fill, args=(mailbox, self._source, self._arriving_frames()), name="sidestream-reader", daemon=True
        )
        thread.start()
        return thread


def _fill(mailbox: Mailbox, source: FrameSource, frames: Iterator[Frame]) -> None:
    """The reader thread: every frame into the mailbox, then the source is closed."""
    try:
        for frame in frames:
            mailbox.put(frame)
        mailbox.finish()
    except BaseException as error:
        mailbox.finish(error)
    finally:
        source.close()
