"""``SimulatedDevice``: which frames of a clip a circuit takes up, and when its answers are ready, from runtimes.

    no delays, or one runtime for the whole net     one device: frame after frame, all stages in a row (``one_device``)
    delays, and a runtime for each stage            a device for each group of stages (``pipeline``): those that a wire
                                                    without delay joins work one after the other in a tick
    delays that bring a stage frames of             in lockstep: a tick begins when its frame is there and the tick
    different ages                                  before is over
    layers that look ahead                          their answers wait for as many further frames

An answer is never ready before the frames that it needs have been worked on. What cannot be had so is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sidestream.circuit.ages import lags_of, latency_ticks, look_ahead_ticks, mixes_ages
from sidestream.circuit.stage import SOURCE
from sidestream.circuit.wire import Circuit
from sidestream.engine.executors.frame_parallel import why_not_frame_parallel
from sidestream.errors import InputError
from sidestream.evals.streaming.runtimes import RuntimeProfile
from sidestream.evals.streaming.schedule import Work, answered_later, one_device, pipeline, unlimited_devices

UNLIMITED = "unlimited"
"""The policy of a device for every frame."""


@dataclass(frozen=True)
class SimulatedDevice:
    """Runtimes and a scheduling rule in place of a clock."""

    profile: RuntimeProfile
    frame_rate: float
    policy: str = "idle-free"
    """A name of ``POLICIES`` or "unlimited"; a circuit with delays takes up every frame that it can."""
    seed: int = 0

    def schedule(self, circuit: Circuit, num_frames: int, clip_number: int) -> list[Work]:
        """The schedule of one clip. A profile with a column per stage of a circuit with delays is a pipeline.

        Raises ``InputError`` for circuits whose schedule cannot be told by these rules.
        """
        rate, seed = self.frame_rate, self.seed + clip_number
        self._check_runtimes(circuit)
        is_pipeline = self.profile.num_stages > 1 and latency_ticks(circuit) > 0 and self.policy != UNLIMITED
        if is_pipeline:
            self._check_stages(circuit)
            rows = grouped(self.profile.draw_rows(rate, seed=seed), parallel_groups(circuit))
            num_ticks = latency_ticks(circuit) + 1
            works = pipeline(num_frames, rows, lockstep=mixes_ages(circuit), num_ticks=num_ticks)
            return answered_later(works, look_ahead_ticks(circuit))
        runtimes = self.profile.draw(rate, seed=seed)
        if self.policy == UNLIMITED:
            if (reason := why_not_frame_parallel(circuit)) is not None:
                raise InputError(f"the circuit cannot have a device for every frame: {reason}; choose another policy")
            return unlimited_devices(num_frames, runtimes)
        works = one_device(num_frames, runtimes, policy=self.policy, expected=self.profile.mean_seconds * rate)
        num_newer = latency_ticks(circuit) if mixes_ages(circuit) else 0  # else a frame goes through by itself
        return answered_later(works, num_newer + look_ahead_ticks(circuit))

    def _check_runtimes(self, circuit: Circuit) -> None:
        given, wanted = self.profile.num_stages, circuit.num_stages
        if given not in (1, wanted):
            as_many = "" if wanted == 1 else f", or {wanted}, one for each stage"
            raise InputError(
                f"runtimes of {given} stages for a circuit of {wanted}; give one for the whole net{as_many}"
            )

    def _check_stages(self, circuit: Circuit) -> None:
        instead = "give one runtime for the whole net, or run it live"
        if max(circuit.periods) > 1:
            raise InputError(f"stages that do not work in every tick cannot be simulated stage by stage; {instead}")
        if circuit.has_feedback and not mixes_ages(circuit) and len(set(self.profile.rows_seconds)) > 1:
            raise InputError(
                "a circuit with feedback waits for its own answers, which is simulated only for stages that always "
                f"take as long; {instead}"
            )


def parallel_groups(circuit: Circuit) -> list[list[int]]:
    """The stages by number, in the groups that work in parallel: inside of one, one stage works after the other.

    A group is what wires without delay join; where no stage sees frames of different ages, all stages that are on the
    same frame.
    """
    if not mixes_ages(circuit):
        group_of = list(lags_of(circuit))
    else:
        group_of = list(range(circuit.sink))
        for number in range(1, circuit.sink):
            for wire in circuit.wires_into(number):
                if wire.delay == 0 and wire.source != SOURCE:
                    joined = group_of[wire.source]
                    group_of = [group_of[number] if each == joined else each for each in group_of]
    stages = range(1, circuit.sink)
    return [[n for n in stages if group_of[n] == group] for group in sorted(set(group_of[1 : circuit.sink]))]


def grouped(rows: Iterable[Sequence[float]], groups: Sequence[Sequence[int]]) -> Iterator[tuple[float, ...]]:
    """Runtimes of groups, the stages of each one after the other, from those of the stages."""
    for row in rows:
        yield tuple(sum(row[number - 1] for number in group) for group in groups)


def constant_profile(runtimes_ms: Iterable[float]) -> RuntimeProfile:
    """A device whose stages always take as long, in milliseconds."""
    return RuntimeProfile((tuple(ms / 1e3 for ms in runtimes_ms),))
