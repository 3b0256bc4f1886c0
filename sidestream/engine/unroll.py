"""``unroll``: a circuit run over a clip, with ordinary autograd through registers, states and feedback.

The answers are those of ``run(circuit, frames)``, stacked. Two ways give the same numbers and gradients:

    "ticks"    the machine itself, tick by tick: any circuit
    "stages"   stage by stage, all ticks of a stage as one batch: what stage j writes in the ticks s <= t < e needs
               what stage i wrote in the ticks s - d <= t < e - d, for every wire (i -> j, d); no feedback, no clocks

A clip of T frames makes the ticks 0 ... T - 1; to ``drain``, ``latency_ticks`` more with the last frame again, so that
every frame is answered, as ``run`` does where ages mix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sidestream.circuit.ages import latency_ticks, look_ahead_ticks
from sidestream.circuit.stage import NOTHING, State, Values
from sidestream.circuit.wire import Circuit
from sidestream.engine.rules.forward import Forward
from sidestream.engine.rules.loss_stage import with_gradients
from sidestream.engine.tick import Cell, Fed, LineBack, Machine, Message
from sidestream.engine.unroll_stages import by_stages, clip_form
from sidestream.engine.unrolled import Trace, Unrolled
from sidestream.errors import CircuitError, LayoutError
from sidestream.types import Output

__all__ = ["Trace", "Unrolled", "Way", "reason_for_ticks", "unroll"]

Way = Literal["auto", "ticks", "stages"]


def unroll(
    circuit: Circuit, clip_BTCHW: Tensor, *, way: Way = "auto", drain: bool = True, traced: bool = False
) -> Unrolled:
    """Run ``circuit`` over a clip, or over anything else (B, T, ...), in the caller's gradient mode.

    Args:
        way: "ticks", "stages" (much faster), or "auto": "stages" where the circuit allows it.
        drain: answer every frame; otherwise give only the answers that are made while the clip lasts.
        traced: also give what every stage wrote.

    In "stages" a module in train mode sees all ticks as one batch: batch norms take their statistics over them.

    Raises CircuitError for circuits that look ahead, or take several inputs, or cannot go the way that was asked for;
    LayoutError for clips too short to bring an answer.
    """
    latency = latency_ticks(circuit)
    _check(circuit, clip_BTCHW, latency, drain, way)
    num_ticks = clip_BTCHW.shape[1] + (latency if drain else 0)
    if way == "stages" or (way == "auto" and reason_for_ticks(circuit) is None):
        return by_stages(circuit, clip_BTCHW, num_ticks, traced)
    return _by_ticks(circuit, clip_BTCHW, num_ticks, traced)


def reason_for_ticks(circuit: Circuit) -> str | None:
    """Why the circuit must go tick by tick; None where it may go stage by stage."""
    if circuit.has_feedback:
        return "it has feedback"
    if set(circuit.periods) != {1}:
        return f"its stages tick at the periods {circuit.periods}"
    for number, stage in enumerate(circuit.stages, start=1):
        if clip_form(stage) is None:
            return f"stage {number} ({stage.name}) has a state, or is no module whose first axis is the batch"
    return None


def _check(circuit: Circuit, clip: Tensor, latency: int, drain: bool, way: str) -> None:
    if way not in ("auto", "ticks", "stages"):
        raise CircuitError(f"{way = }; expected 'auto', 'ticks' or 'stages'")
    if way == "stages" and (reason := reason_for_ticks(circuit)):
        raise CircuitError(f"the circuit cannot be unrolled stage by stage: {reason}; use way='ticks'")
    if circuit.in_spec.num_leaves != 1:
        raise CircuitError(f"the circuit takes {circuit.in_spec.num_leaves} inputs; only one clip can be unrolled")
    if look_ahead_ticks(circuit):
        raise CircuitError(
            f"the circuit looks {look_ahead_ticks(circuit)} ticks ahead; unroll takes causal stages only"
        )
    if clip.ndim < 2 or clip.shape[1] < (1 if drain else latency + 1):
        raise LayoutError(
            f"a clip of shape {tuple(clip.shape)} was given; the circuit answers after {latency} ticks, so give "
            f"(B, T, ...) with {1 if drain else latency + 1} frames or more"
        )


# Tick by tick.


@dataclass(frozen=True, eq=False)
class _Differentiable:
    """A step that leaves the engine's inference mode for the gradient mode of the caller."""

    step: Callable[[Values, State], tuple[Values, State]]
    has_gradients: bool

    def __call__(self, inputs: Values, state: State) -> tuple[Values, State]:
        with torch.inference_mode(False), torch.set_grad_enabled(self.has_gradients):
            return self.step(inputs, state)


class _Recording:
    """A rule that notes what each stage wrote."""

    goes_back = False

    def __init__(self, num_stages: int) -> None:
        self._rule = Forward()
        self.written: list[list[tuple[int, Sequence[Message]]]] = [[] for _ in range(num_stages)]

    def lines_back(self, circuit: Circuit) -> Sequence[LineBack]:
        return ()

    def fire(self, cell: Cell, messages: Sequence[Message]) -> Sequence[Message]:
        made = self._rule.fire(cell, messages)
        self.written[cell.number - 1].append((cell.tick, made))
        return made

    def finish(self, cell: Cell) -> Sequence[Sequence[Message]]:
        return self._rule.finish(cell)


def _by_ticks(circuit: Circuit, clip: Tensor, num_ticks: int, traced: bool) -> Unrolled:
    is_on = torch.is_grad_enabled()
    stages = tuple(replace(s, step=_Differentiable(with_gradients(s), is_on)) for s in circuit.stages)
    rule = _Recording(circuit.num_stages)
    machine = Machine(circuit.replace(stages=stages), rule if traced else Forward())
    frames, outputs = clip.unbind(1), []
    for tick in range(num_ticks):
        is_new = tick < len(frames)
        machine.feed([frames[min(tick, len(frames) - 1)]], Fed(tick, 0.0, 0.0, None) if is_new else None)
        for cell in machine.cells:
            machine.fire(cell)
        outputs.append(machine.collect(0.0)[1])
    made: list[Output] = [output for output in outputs if output is not None]
    if not made:
        raise LayoutError(f"the circuit gave no answer in {num_ticks} ticks; give a longer clip")
    leaves = zip(*(pytree.tree_leaves(output.value) for output in made), strict=True)
    return Unrolled(
        pytree.tree_unflatten([torch.stack(leaf, 1) for leaf in leaves], circuit.out_spec),
        tuple(output.tick for output in made),
        tuple(output.frame_index for output in made),
        tuple(output.oldest_frame_index for output in made),
        tuple(output.newest_frame_index for output in made),
        tuple(output.is_warm_up for output in made),
        tuple(map(_trace, rule.written)) if traced else (),
    )


def _trace(written: Sequence[tuple[int, Sequence[Message]]]) -> Trace:
    kept = [(tick, made) for tick, made in written if all(m.value is not NOTHING for m in made)]
    firsts = [made[0] for _, made in kept]
    return Trace(
        tuple(torch.stack([m.value for m in column], 1) for column in zip(*(made for _, made in kept), strict=True)),
        tuple(tick for tick, _ in kept),
        tuple(m.oldest for m in firsts),
        tuple(m.newest for m in firsts),
    )
