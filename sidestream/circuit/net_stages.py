"""Circuits of nets that are defined as blocks (``models.depth_net``): one stage per block, the links as they say.

    circuit = net_circuit(net, frame_BCHW, "sequential")            # or "pipelined", "parallel", "semi-parallel:5" ...

The parameters are the net's own, so the same weights run in every wiring. Stages take any number of streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sidestream.circuit.build_stages import stage_of
from sidestream.circuit.measure import num_bytes
from sidestream.circuit.stage import Link, Stage, Stages, State, Values
from sidestream.circuit.wire import Circuit
from sidestream.circuit.wiring import wire, with_feedback
from sidestream.models.depth_net import Block, DepthNet, step_of
from sidestream.models.info import info_of
from sidestream.nn.steppable import Steppable


@dataclass(frozen=True, eq=False)
class LayerStep:
    """``step`` of a stage that is a streaming layer; its state begins with the first value that it is given."""

    layer: Steppable

    def __call__(self, inputs: Values, state: State) -> tuple[Values, State]:
        answer, state = step_of(self.layer, inputs, state)
        return (answer,), state

    def on_clip(self, inputs: Values) -> Values:
        """All ticks at once, inputs and outputs (B, T, ...), from the start of a stream."""
        return (self.layer(inputs[0] if len(inputs) == 1 else inputs),)


def stages_of_net(net: DepthNet, frame_BCHW: Tensor) -> Stages:
    """The blocks of ``net`` as stages. ``frame_BCHW``: of the size that it will be fed.

    A block that reads the last answer is linked to the frame in its place; ``net_circuit`` lays the wire back.
    Raises ``LayoutError`` for frames of a size that the net does not take.
    """
    net.check_frame(frame_BCHW)
    blocks, links = net.depth_blocks(), []
    values: list[Tensor] = [frame_BCHW]
    stages = []
    modes = [(m, m.training) for m in net.modules()]
    try:
        for m, _ in modes:
            m.training = False
        for number, block in enumerate(blocks, start=1):
            inputs = tuple(values[n] for n in block.reads)
            links += [Link(source, 0, number, k) for k, source in enumerate(block.reads)]
            if block.reads_answer:
                inputs += (net.no_answer(frame_BCHW),)
                links.append(Link(0, 0, number, len(block.reads)))
            with torch.no_grad():
                values.append(step_of(block.layer, inputs, None)[0])
            stages.append(_stage(block, inputs, values[-1]))
    finally:
        for m, mode in modes:
            m.training = mode
    links.append(Link(len(blocks), 0, len(blocks) + 1, 0))
    in_spec, out_spec = pytree.tree_structure(((frame_BCHW,), {})), pytree.tree_structure(values[-1])
    info = info_of(net)
    name = type(net).__name__ if info is None else info.name
    spec = None if info is None else info.input_spec.replace(layout="BCHW", num_frames=1, min_frames=None)
    return Stages(tuple(stages), tuple(links), in_spec, out_spec, name, spec, ((frame_BCHW,), {}))


def net_circuit(net: DepthNet, frame_BCHW: Tensor, wiring: str = "parallel") -> Circuit:
    """``net`` as a circuit, wired by name (``circuit.wiring.wire``), with its feedback if it has any."""
    circuit = wire(stages_of_net(net, frame_BCHW), wiring)
    for number, block in enumerate(net.depth_blocks(), start=1):
        if block.reads_answer:
            ends: dict[str, Any] = {"source": circuit.num_stages, "output": 0, "target": number}
            circuit = with_feedback(circuit, **ends, input=len(block.reads), initial=net.no_answer(frame_BCHW))
    return circuit


def _unbegun() -> State:
    return None


def _stage(block: Block, inputs: Values, output: Tensor) -> Stage:
    if not isinstance(block.layer, Steppable):
        return stage_of(block.layer, inputs, name=block.name)
    return Stage(
        name=block.name,
        step=LayerStep(block.layer),
        num_inputs=len(inputs),
        num_outputs=1,
        init_state=_unbegun,
        output_bytes=(num_bytes(output),),
        module=block.layer,
        example_inputs=inputs,
    )
