"""Where a stage stands in a circuit that is trained: who sends it what, which parameters are its own, and whether
going forward a second time repeats the first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
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
    sends_back: bool = True

    @property
    def wants(self) -> list[bool]:
        """Which inputs have a stage behind them that waits for a cotangent."""
        return [self.sends_back and wire.source != SOURCE for wire in self.reads]

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


def check_repeatable(number: int, stage: Stage, advice: str, *, statistics_matter: bool = True) -> None:
    """CircuitError where a second forward would not repeat the first.

    ``statistics_matter``: also where it would only count a frame twice (``undisturbed_statistics`` prevents that).
    """
    modules = list(stage.module.modules()) if stage.module is not None else []
    norms = any(_counts(m) for m in modules)
    drops = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0 for m in modules)
    drops = drops or any(isinstance(m, torch.fx.GraphModule) and _has_dropout(m) for m in modules)
    drops = drops or any(isinstance(m, nn.RNNBase) and m.training and m.dropout > 0 for m in modules)
    writes = (norms or stage.hides_state) if statistics_matter else (stage.hides_state and not norms)
    if drops or writes:
        what = "draws random numbers (dropout)" if drops else "updates statistics (batch norm in train mode)"
        raise CircuitError(
            f"stage {number} ({stage.name}) {what}, so going forward a second time would not repeat the first; {advice}"
        )


@contextmanager
def undisturbed_statistics(module: nn.Module | None) -> Iterator[None]:
    """Inside, batch norms in train mode update copies of their running statistics, which are then dropped."""
    counting = [m for m in module.modules() if _counts(m)] if module is not None else []
    kept = [dict(m._buffers) for m in counting]
    for m in counting:
        m._buffers.update({name: None if b is None else b.clone() for name, b in m._buffers.items()})
    try:
        yield
    finally:
        for m, buffers in zip(counting, kept, strict=True):
            m._buffers.update(buffers)


def _counts(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training


def _has_dropout(graph_module: torch.fx.GraphModule) -> bool:
    """Dropout that was traced in train mode: ``aten.dropout(x, p, True)``."""
    nodes = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)
    return any(bool(node.args[2]) and node.args[1] > 0 for node in nodes)
