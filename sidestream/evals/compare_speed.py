"""Speed and energy of models on a stream: all of them in turn, repeat after repeat, so that drifts hit all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sidestream.nn.steppable import Steppable
from sidestream.report.energy import EnergyMeter
from sidestream.types import NOTHING


@dataclass(frozen=True)
class Speed:
    """One model in one repeat."""

    latency_seconds: float
    """Median over the answers of the step that gave one: from the arrival of its newest frame to the answer."""
    frames_per_second: float
    """Frames of the stream that were taken per second, answers at the model's own rate among them."""
    num_answers: int
    num_frames: int
    joules_per_frame: float | None
    """None where no counter can be read."""


@dataclass
class Runner:
    """A stream that goes on from one repeat to the next."""

    stream: Steppable
    frame_BCHW: Tensor
    energy: EnergyMeter | None = None
    _state: Any = field(default=None, init=False)

    @torch.no_grad()
    def warm_up(self, num_frames: int) -> None:
        """Start the stream and fill its caches: ``num_frames`` frames and the stream's delay, whole periods."""
        period, wanted = self.stream.period_ticks, num_frames + self.stream.delay_ticks
        self._state = self.stream.init_state(self.frame_BCHW)
        for _ in range(-(-wanted // period) * period):
            self._step()

    @torch.no_grad()
    def measure(self, seconds: float) -> Speed:
        """Whole periods until ``seconds`` have passed, one at least."""
        steps, latencies = 0, []
        joules, began = self._joules(), self._now()
        until = began + seconds
        while not steps or self._now() < until:
            for _ in range(self.stream.period_ticks):
                at = self._now()
                if self._step() is not NOTHING:
                    latencies.append(self._now() - at)
                steps += 1
        elapsed, used = self._now() - began, self._joules()
        per_frame = None if joules is None or used is None else (used - joules) / steps
        return Speed(statistics.median(latencies), steps / elapsed, len(latencies), steps, per_frame)

    def _step(self) -> Any:
        answer, self._state = self.stream.step(self.frame_BCHW, self._state)
        return answer

    def _joules(self) -> float | None:
        return None if self.energy is None else self.energy.read_joules()

    def _now(self) -> float:
        return _now(self.frame_BCHW.device)


def _now(device: torch.device | str) -> float:
    """Clock reading when all work on ``device`` so far is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(work: Callable[[], Any], *, num_repeats: int = 3, device: torch.device | str = "cpu") -> float:
    """Median time of one call without gradients, after one to warm up."""
    with torch.no_grad():
        times = []
        for _ in range(num_repeats + 1):
            began = _now(device)
            work()
            times.append(_now(device) - began)
    return statistics.median(times[1:])
