"""Tracing changes what modules do for a moment: who calls modules waits for it, and it waits for who does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Many callers at once, or one tracer alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._num_inside = 0
        self._tracer: int | None = None

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Inside, nobody traces (but this thread itself)."""
        me = threading.get_ident()
        with self._changed:
            while self._tracer not in (None, me):
                self._changed.wait()
            self._num_inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_inside -= 1
                if self._num_inside == 0:
                    self._changed.notify_all()

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Inside, nobody calls modules (but this thread)."""
        with self._changed:
            while self._tracer is not None or self._num_inside:
                self._changed.wait()
            self._tracer = threading.get_ident()
        try:
            yield
        finally:
            with self._changed:
                self._tracer = None
                self._changed.notify_all()


GATE = Gate()
ONE_CUT = threading.RLock()
"""Held by a cut: it puts the model back afterwards, so that cuts, and starts of runs, wait for each other."""
