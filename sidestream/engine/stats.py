"""The books of a run: frames, answers, latencies, how busy each stage was."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from sidestream.types import Output

NUM_KEPT_LATENCIES = 10_000


@dataclass
class RunStats:
    """The books of a run, in bounded memory; complete when the run has ended."""

    executor: str
    num_workers: int
    num_answered: int = 0
    first_arrived_at_seconds: float | None = None
    last_made_at_seconds: float = 0.0
    latencies_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_KEPT_LATENCIES))
    """From arrival to answer, of the last 10,000 answers."""
    busy_seconds: tuple[float, ...] = ()
    """Time that each stage was at work."""
    num_frames: int = 0
    """Frames taken from the stream."""

    def book(self, output: Output) -> None:
        """Count an answer."""
        self.num_answered += 1
        self.latencies_seconds.append(output.latency_seconds)
        if self.first_arrived_at_seconds is None:
            self.first_arrived_at_seconds = output.arrived_at_seconds
        self.last_made_at_seconds = max(self.last_made_at_seconds, output.made_at_seconds)

    @property
    def elapsed_seconds(self) -> float:
        """From the arrival of the first answered frame to the last answer."""
        first = self.first_arrived_at_seconds
        return 0.0 if first is None else self.last_made_at_seconds - first

    @property
    def frames_per_second(self) -> float:
        return self.num_answered / self.elapsed_seconds if self.elapsed_seconds > 0 else 0.0

    @property
    def busy_shares(self) -> tuple[float, ...]:
        """Share of the run during which each stage was at work (frame-parallel: may exceed 1)."""
        return tuple(b / self.elapsed_seconds if self.elapsed_seconds > 0 else 0.0 for b in self.busy_seconds)
