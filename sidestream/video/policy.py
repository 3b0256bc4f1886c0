"""What a stream does when its reader is slower than its source: newest, lossless or bounded."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from sidestream.errors import InputError
from sidestream.types import Frame


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy by its numbers: ``capacity`` frames wait, the oldest is dropped; None drops nothing."""

    name: str
    capacity: int | None


def parse_policy(text: str) -> Policy:
    """``"newest"``, ``"lossless"`` or ``"bounded:N"`` (N >= 1).

    Raises:
        InputError: anything else.
    """
    name, _, number = text.partition(":")
    if text == "newest":
        return Policy("newest", 1)
    if text == "lossless":
        return Policy("lossless", None)
    if name == "bounded" and number.isdigit() and int(number) >= 1:
        return Policy(text, int(number))
    raise InputError(f"policy {text!r} is not known; use 'newest', 'lossless' or 'bounded:N' with N >= 1")


WAKE_SECONDS = 0.1
"""A waiting reader looks up so often, for a stop or for Ctrl-C."""


class StopFlag:
    """Set once, seen by every thread. A plain attribute and no lock, so that a signal handler may set it."""

    is_set = False


class Mailbox:
    """A short queue between the thread that reads a source and the one that uses it; the oldest is dropped.

    When ``stopped`` is set, a waiting reader gets None within 0.1 s, whether frames wait or not.
    """

    def __init__(self, capacity: int, stopped: StopFlag | None = None) -> None:
        self.num_dropped = 0
        self._stopped = stopped or StopFlag()
        self._waiting: deque[Frame] = deque(maxlen=capacity)
        self._changed = threading.Condition()
        self._finished = False
        self._error: BaseException | None = None

    def put(self, frame: Frame) -> None:
        """Leave a frame; never waits."""
        with self._changed:
            self.num_dropped += len(self._waiting) == self._waiting.maxlen
            self._waiting.append(frame)
            self._changed.notify()

    def finish(self, error: BaseException | None = None) -> None:
        """No more frames will come; ``error`` is raised in the reader after the last waiting frame."""
        with self._changed:
            self._finished, self._error = True, self._error or error
            self._changed.notify_all()

    @property
    def is_empty(self) -> bool:
        return not self._waiting

    def flush(self) -> None:
        """Throw away what waits, uncounted, and count drops from zero again."""
        with self._changed:
            self._waiting.clear()
            self.num_dropped = 0

    def get(self) -> Frame | None:
        """The oldest waiting frame, waiting for one if need be; None at the end.

        Raises:
            BaseException: whatever ended the source, as given to ``finish``.
        """
        with self._changed:
            while not (self._waiting or self._finished or self._stopped.is_set):
                self._changed.wait(WAKE_SECONDS)
            if self._stopped.is_set:
                return None
            if self._waiting:
                return self._waiting.popleft()
            if self._error is not None:
                raise self._error
            return None
