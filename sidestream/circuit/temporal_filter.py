"""Temporal filters: a stage that also reads what its inputs were in earlier ticks, along the channels.

Massively Parallel Video Networks (ECCV 2018) names them as a wiring pattern: a block also reads earlier time steps, as
a convolution over time does. Here they are more wires, with longer delays, into a stage whose first layer is wider:

    input n of the stage, wire (i -> j, d)     ->     wires (i -> j, d), (i -> j, d + 1) ... (i -> j, d + taps - 1)

The earlier inputs count in the ages: ``latency_ticks`` grows by taps - 1 for every filtered stage on the longest path
(an answer is about the oldest frame that it reads), ``information_latency_ticks`` does not.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from sidestream.circuit.build_stages import ModuleStep, stage_of, widened
from sidestream.circuit.wire import Circuit, Wire
from sidestream.errors import CircuitError


class Filtered(nn.Module):
    """``module`` behind the place where the taps of each input meet; newest first."""

    def __init__(self, module: nn.Module, taps: int) -> None:
        super().__init__()
        self.module, self.taps = module, taps

    def forward(self, *inputs: Tensor) -> object:
        per_input = [inputs[n : n + self.taps] for n in range(0, len(inputs), self.taps)]
        return self.module(*(torch.cat(taps, 1) for taps in per_input))


def with_temporal_filter(circuit: Circuit, stage: int, *, taps: int = 2, widen: bool = True) -> Circuit:
    """Stage ``stage`` reads each of its inputs in the newest ``taps`` ticks, concatenated along axis 1.

    ``widen``: give the first convolution or linear layer of the stage's module, which has one input, weights for the
    earlier ticks, in place; they begin at zero, so that the circuit's answers begin as they were (but for their
    latency). Otherwise the module must take that many channels already.

    Raises CircuitError for stages that are not made of a module (``stages_of``, ``stage_of``).
    """
    if not 1 <= stage <= circuit.num_stages or taps < 1:
        raise CircuitError(f"{stage = }, {taps = }; expected a stage from 1 to {circuit.num_stages}, and 1 tap or more")
    old = circuit.stages[stage - 1]
    if not isinstance(old.step, ModuleStep) or old.example_inputs is None:
        raise CircuitError(f"stage {stage} ({old.name}) is not made of a module; make it with stages_of or stage_of")
    module = old.module
    if widen and taps > 1:
        if old.num_inputs != 1:
            raise CircuitError(
                f"stage {stage} ({old.name}) has {old.num_inputs} inputs, so it is not known which channels of its "
                "first layer are whose; make the module wide enough and use widen=False"
            )
        module = wider_by_zeros(module, (taps - 1) * old.example_inputs[0].shape[1])
    examples = tuple(x for x in old.example_inputs for _ in range(taps))
    made = stage_of(Filtered(module, taps).train(module.training), examples, name=old.name)
    stages = (*circuit.stages[: stage - 1], replace(made, cost_seconds=old.cost_seconds), *circuit.stages[stage:])
    wires: list[Wire] = [w for w in circuit.wires if w.target != stage]
    for w in circuit.wires_into(stage):
        wires += [replace(w, input=w.input * taps + k, delay=w.delay + k) for k in range(taps)]
    return circuit.replace(stages=stages, wires=tuple(wires), wiring=f"{circuit.wiring}, {taps} taps at {stage}")


@torch.no_grad()
def wider_by_zeros(module: nn.Module, num_more: int) -> nn.Module:
    """``circuit.build_stages.widened``, the new weights zero: the module answers as before whatever the new inputs."""
    first = next(((p, m) for p, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)), None)
    wide = widened(module, num_more)  # raises where there is none
    assert first is not None
    path, before = first
    layer = wide.get_submodule(path) if path else wide
    layer.weight[:, before.weight.shape[1] :] = 0  # type: ignore[index,union-attr,operator]
    return wide
