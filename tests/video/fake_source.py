"""A source that gives what the test hands over, and watches that nobody closes it while somebody is inside."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator

import torch

from sidestream.types import Frame
from sidestream.video import StreamInfo


def blank(index: int, pts_seconds: float | None = None) -> Frame:
    """A small picture, at 25 a second unless told otherwise."""
    return Frame(torch.zeros(2, 4, 3, dtype=torch.uint8), index, index / 25 if pts_seconds is None else pts_seconds)


def wait_until(is_true: Callable[[], object], seconds: float = 5.0) -> None:
    """Look until it is true."""
    until = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < until, "it did not come true in time"
        time.sleep(0.002)


class FakeSource:
    """Blocks in ``frames``, as FFmpeg does on a silent network, until something is handed over."""

    def __init__(self, *, is_live: bool = True) -> None:
        self.info = StreamInfo("fake", 4, 2, 25.0, is_live, None)
        self.num_reconnects, self.num_corrupt_packets = 0, 0
        self.num_asked = 0
        """How often a frame was asked for: one more than were taken in, when all are."""
        self.is_inside = self.is_stopped = self.was_closed_while_inside = False
        self.num_closes = 0
        self._handed: queue.SimpleQueue[Frame | Exception | None] = queue.SimpleQueue()

    def hand(self, *items: Frame | Exception | None) -> None:
        """Frames to give, an error to raise, or None for the end."""
        for item in items:
            self._handed.put(item)

    def frames(self) -> Iterator[Frame]:
        while not self.is_stopped:
            item = self._next()
            if item is None:
                return
            yield item

    def stop(self) -> None:
        self.is_stopped = True

    def close(self) -> None:
        self.num_closes += 1
        self.was_closed_while_inside |= self.is_inside

    def _next(self) -> Frame | None:
        self.is_inside = True
        self.num_asked += 1
        item = self._handed.get()
        self.is_inside = False
        if isinstance(item, Exception):
            raise item
        return item


class BusySource(FakeSource):
    """Gives frames without end, each after ``work``."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(is_live=False)
        self._work = work

    def _next(self) -> Frame:
        self.is_inside = True
        self._work()
        self.is_inside = False
        self.num_asked += 1
        return blank(self.num_asked - 1)
