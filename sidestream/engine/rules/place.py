"""Where a stage stands in a circuit that is trained: who sends it what, and which parameters are its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.nn import Parameter

from sidestream.circuit.stage import SOURCE, Stage
from sidestream.circuit.wire import Circuit, Wire
from sidestream.engine.rules.loss_stage import with_gradients
from sidestream.engine.rules.stage_backward import Step
from sidestream.engine.tick import Message
from sidestream.errors import CircuitError


@dataclass(frozen=True, slots=True)
class Place:
    """The wires of a stage and its step, in a circuit with the loss in it."""

    reads: tuple[Wire, ...]
    read_by: tuple[Wire, ...]
    takes_loss: bool
    step: Step

    @property
    def wants(self) -> list[bool]:
        """Which inputs have a stage behind them that waits for a cotangent."""
        return [wire.source != SOURCE for wire in self.reads]

    @property
    def outputs_read(self) -> list[int]:
        """The output that each cotangent is about."""
        return [wire.output for wire in self.read_by]

    def split(self, messages: Sequence[Message]) -> tuple[Sequence[Message], Sequence[Message]]:
        """What came forward, and what came back."""
        return messages[: len(self.reads)], messages[len(messages) - len(self.read_by) :]


def places_of(circuit: Circuit) -> tuple[Place, ...]:
    """One per stage; the last one takes the loss."""
    return tuple(
        Place(tuple(circuit.wires_into(n)), tuple(circuit.wires_from(n)), n == len(circuit), with_gradients(stage))
        for n, stage in enumerate(circuit.stages, start=1)
    )


def parameters_of(stages: Sequence[Stage]) -> list[dict[str, Parameter]]:
    """The trainable parameters of each stage, by name. CircuitError where two stages share one."""
    found: list[dict[str, Parameter]] = []
    owners: dict[int, str] = {}
    for number, stage in enumerate(stages, start=1):
        named = dict(stage.module.named_parameters()) if stage.module is not None else {}
        own = {name: p for name, p in named.items() if p.requires_grad}
        for name, parameter in own.items():
            here = f"{name!r} of stage {number} ({stage.name})"
            if id(parameter) in owners:
                raise CircuitError(
                    f"{owners[id(parameter)]} is also {here}: stages that run side by side cannot share a parameter "
                    "in training; keep both uses in one stage, or untie them"
                )
            owners[id(parameter)] = here
        found.append(own)
    return found
