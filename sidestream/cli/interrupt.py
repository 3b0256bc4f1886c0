"""What Ctrl-C does to a running command."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C calls ``stop``, which takes no more frames, so that those in flight are answered and the files
    finished. Further ones end the command at once."""

    def interrupted(number: int, stack: Any) -> None:
        stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = signal.signal(signal.SIGINT, interrupted)
    except ValueError:  # not in the main thread: there is no Ctrl-C to catch
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
