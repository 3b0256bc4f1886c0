"""When frames arrive: as they are read, at their presentation times, or simulated on a clock that is not the wall's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from sidestream.clock import Clock
from sidestream.types import Frame
from sidestream.video.policy import WAKE_SECONDS, Mailbox, StopFlag


def arriving(frames: Iterator[Frame], clock: Clock) -> Iterator[Frame]:
    """Frames that arrive when they are read."""
    for frame in frames:
        yield dataclasses.replace(frame, arrived_at_seconds=clock.now())


def timed(frames: Iterator[Frame], clock: Clock) -> Iterator[tuple[float, Frame]]:
    """When each frame is due, the first one now, and the frame with that as its arrival."""
    start_seconds: float | None = None
    for frame in frames:
        if start_seconds is None:
            start_seconds = clock.now() - frame.pts_seconds
        due_seconds = start_seconds + frame.pts_seconds
        yield due_seconds, dataclasses.replace(frame, arrived_at_seconds=due_seconds)


def due_frames(frames: Iterator[Frame], clock: Clock, stopped: StopFlag) -> Iterator[Frame]:
    """Each frame when it is due; ends within 0.1 s when ``stopped`` is set."""
    for due_seconds, frame in timed(frames, clock):
        while not stopped.is_set and (now_seconds := clock.now()) < due_seconds:
            clock.sleep_until(min(due_seconds, now_seconds + WAKE_SECONDS))
        if stopped.is_set:
            return
        yield frame


class SimulatedReplay:
    """A replay's reader thread without the thread: what it would have put into the mailbox by now, when asked."""

    def __init__(self, frames: Iterator[Frame], mailbox: Mailbox, clock: Clock) -> None:
        self._upcoming, self._mailbox, self._clock = timed(frames, clock), mailbox, clock
        self._following: tuple[float, Frame] | None = None
        self._has_begun = False

    def put_due(self) -> None:
        """Put every frame that is due by now; none before the first ``put_next``, which starts the replay."""
        while self._following is not None and self._following[0] <= self._clock.now():
            self._mailbox.put(self._following[1])
            self._advance()

    def put_next(self) -> None:
        """``put_due``, and where then nothing waits, sleep until a frame is due."""
        if not self._has_begun:
            self._has_begun = True
            self._advance()
        self.put_due()
        while self._following is not None and self._mailbox.is_empty:
            self._clock.sleep_until(self._following[0])
            self.put_due()

    def _advance(self) -> None:
        self._following = next(self._upcoming, None)
        if self._following is None:
            self._mailbox.finish()
