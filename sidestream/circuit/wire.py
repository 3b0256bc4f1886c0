"""Wires and circuits: stages joined by wires that hold a value for a number of ticks.

At tick t, stage j reads on the wire (i -> j, d) what stage i wrote at tick t - d. d = 0 means in the same tick,
which orders the two inside the tick; d >= 1 means a register, which frees the two to run in parallel.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch.utils import _pytree as pytree

from sidestream.circuit.stage import SOURCE, Link, Stage, check_links
from sidestream.errors import CircuitError


@dataclass(frozen=True, order=True)
class Wire(Link):
    """A link with a delay in ticks. A wire that runs back (target <= source) is feedback and has an initial value."""

    delay: int = 0
    initial: Any = field(default=None, compare=False, repr=False)
    """What a feedback wire holds until its stage has written something."""

    @property
    def is_feedback(self) -> bool:
        return self.target <= self.source


@dataclass(frozen=True)
class Circuit:
    """Stages and wires, ready to run. Immutable: changing it makes another one."""

    stages: tuple[Stage, ...]
    wires: tuple[Wire, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    wiring: str = "custom"
    """How the delays were chosen, in words: sequential, pipelined ..."""
    periods: tuple[int, ...] = ()
    """Stage j computes every periods[j - 1] ticks and holds its output in between; () means every tick."""
    phases: tuple[int, ...] = ()
    """Stage j computes in the ticks t with t % period == phase."""
    name: str = "model"
    input_spec: Any = None
    example: tuple[Any, dict[str, Any]] | None = field(default=None, repr=False, compare=False)
    """``(args, kwargs)`` with which the model was cut, where known."""

    def __post_init__(self) -> None:
        K = len(self.stages)
        if not K:
            raise CircuitError("a circuit needs at least one stage")
        if not self.periods:
            object.__setattr__(self, "periods", (1,) * K)
        if not self.phases:
            object.__setattr__(self, "phases", (0,) * K)
        links = tuple(Link(w.source, w.output, w.target, w.input) for w in self.wires)
        check_links(self.stages, links, self.in_spec.num_leaves, self.out_spec.num_leaves)
        if not any(w.source == SOURCE for w in self.wires):
            raise CircuitError("no stage reads a frame, so the circuit would never end; keep a wire from the source")
        for number, stage in enumerate(self.stages, start=1):
            if stage.is_stateful and not stage.num_inputs:
                raise CircuitError(
                    f"stage {number} ({stage.name}) keeps state but reads nothing, so it would not go with the frames; "
                    "let it read the source"
                )
        _check_delays(self)
        _check_periods(self)

    def __len__(self) -> int:
        return len(self.stages)

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def sink(self) -> int:
        """The number of the sink: K + 1."""
        return len(self.stages) + 1

    @property
    def is_stateful(self) -> bool:
        """Whether an answer depends on more than the frames that its wires bring."""
        return any(s.is_stateful for s in self.stages)

    @property
    def has_feedback(self) -> bool:
        return any(w.is_feedback for w in self.wires)

    def wires_into(self, target: int) -> list[Wire]:
        """The wires that feed ``target``, in the order of its inputs."""
        return sorted((w for w in self.wires if w.target == target), key=lambda w: w.input)

    def wires_from(self, source: int) -> list[Wire]:
        """The wires by which other stages read ``source``, in the order of their targets and inputs."""
        read = (w for w in self.wires if w.source == source and w.target != self.sink)
        return sorted(read, key=lambda w: (w.target, w.input))

    def replace(self, **changes: Any) -> Circuit:
        return replace(self, **changes)


def _check_delays(circuit: Circuit) -> None:
    for wire in circuit.wires:
        if not isinstance(wire.delay, int) or wire.delay < 0:
            raise CircuitError(f"{wire} has the delay {wire.delay!r}; a delay is a whole number of ticks, 0 or more")
        if wire.is_feedback and wire.delay == 0:
            raise CircuitError(f"{wire} runs back without a delay: a stage cannot wait for itself; give it delay >= 1")
        if wire.is_feedback and wire.initial is None:
            raise CircuitError(f"{wire} runs back and has no initial value; give one (zeros, say) of the right shape")


def _check_periods(circuit: Circuit) -> None:
    K = circuit.num_stages
    for name, given in (("periods", circuit.periods), ("phases", circuit.phases)):
        if len(given) != K:
            raise CircuitError(f"{name} has {len(given)} entries for {K} stages: {given}")
    for number, (period, phase) in enumerate(zip(circuit.periods, circuit.phases, strict=True), start=1):
        if period < 1 or not 0 <= phase < period:
            raise CircuitError(f"stage {number}: period {period} and phase {phase}; expected 0 <= phase < period")
    if any(later < earlier for earlier, later in zip(circuit.periods, circuit.periods[1:], strict=False)):
        raise CircuitError(
            f"periods {circuit.periods} get shorter with depth; a stage that ticks more often than the one before it "
            "would repeat the same work. Make the periods grow or stay with depth"
        )
