"""The annotated video of a run: every frame that was taken, in order, each with the newest answer up to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any


class Watched:
    """A stream that shows each of its frames to ``see`` on the way."""

    def __init__(self, frames: Any, see: Callable[[Any], None]) -> None:
        self._frames, self._see = frames, see

    def __iter__(self) -> Iterator[Any]:
        for frame in self._frames:
            self._see(frame)
            yield frame

    def __getattr__(self, name: str) -> Any:
        return getattr(self._frames, name)


class Film:
    """Holds frames until it is known which answer they carry; no more than the circuit holds at once.

    ``show(frame, output)`` draws and writes; ``output`` is the newest answer to this frame or one before, None where
    there is none yet. A model that answers every frame has each frame shown with its own.
    """

    def __init__(self, show: Callable[[Any, Any], None]) -> None:
        self._show = show
        self._waiting: deque[Any] = deque()
        self._newest: Any = None

    def see(self, frame: Any) -> None:
        self._waiting.append(frame)

    def add(self, output: Any) -> None:
        """Show what came before the answered frame with the answer before, and that frame with its own."""
        while self._waiting and self._waiting[0].index < output.frame_index:
            self._show(self._waiting.popleft(), self._newest)
        self._newest = output
        if self._waiting and self._waiting[0].index == output.frame_index:
            self._waiting.popleft()
        self._show(output.frame, output)

    def finish(self) -> None:
        """Show the frames after the last answer with it."""
        while self._waiting:
            self._show(self._waiting.popleft(), self._newest)
