"""The loss as a part of the circuit: its target comes in as one more leaf, and its value goes out as one more.

    frames  -> stage 1 -> ... -> stage K -> answer
    targets -> a wire as long as the latency -^ `-> loss

The target waits on a wire of its own, so that it meets the answer to its frame, on live streams too. In the same tick
the loss is taken inside of stage K; one tick later it is a stage of its own, behind K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from sidestream.circuit.ages import latency_ticks
from sidestream.circuit.stage import NOTHING, SOURCE, Stage, State, Values
from sidestream.circuit.wire import Circuit, Wire
from sidestream.errors import CircuitError, InputError

Loss = Callable[[Any, Any], Tensor]
"""``loss(answer, target)``: a scalar, the mean over the batch."""
TARGETS = ("answered", "newest")


@dataclass(frozen=True, eq=False)
class LossStep:
    """``step`` of the stage that takes the loss: that stage's own step, where it has one, and then the loss."""

    loss: Loss
    out_spec: pytree.TreeSpec
    leaves: tuple[tuple[bool, int], ...]
    """Of each leaf of the answer: whether the stage itself made it, and which output or further input it is."""
    inner: Callable[[Values, State], tuple[Values, State]] | None = None
    num_inner: int = 0

    def __call__(self, inputs: Values, state: State) -> tuple[Values, State]:
        outputs: Values = ()
        if self.inner is not None:
            outputs, state = self.inner(inputs[: self.num_inner], state)
            if any(value is NOTHING for value in outputs):
                return (NOTHING,) * (len(outputs) + 1), state
        *others, target = inputs[self.num_inner :]
        answer = pytree.tree_unflatten([outputs[n] if own else others[n] for own, n in self.leaves], self.out_spec)
        return (*outputs, self._checked(self.loss(answer, target))), state

    @staticmethod
    def _checked(value: Any) -> Tensor:
        if not isinstance(value, Tensor) or value.numel() != 1:
            given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"the loss gave {given}; expected one number, such as the mean over the batch")
        return value.reshape(())


def with_loss(circuit: Circuit, loss: Loss, *, target: str = "answered", loss_delay: int = 0) -> Circuit:
    """``circuit`` with the loss in it. Its last stage is the one that takes the loss, as its last output.

    ``target``: of the frame that is "answered" (the oldest that the answer sees), or of the "newest" frame.
    ``loss_delay``: 0 in the same tick as the last stage, 1 one tick later.
    Raises CircuitError for circuits that cannot be trained tick by tick.
    """
    if target not in TARGETS:
        raise InputError(f"{target = }; expected one of {', '.join(TARGETS)}")
    if loss_delay not in (0, 1):
        raise InputError(f"{loss_delay = }; expected 0 (in the tick of the last stage) or 1 (one tick later)")
    check_trainable(circuit)
    K = circuit.num_stages
    delay = latency_ticks(circuit) if target == "answered" else 0
    last, wires = _loss_stage(circuit, loss) if loss_delay else _fused_stage(circuit, loss)
    kept = circuit.stages if loss_delay else circuit.stages[:-1]
    number, sink = len(kept) + 1, len(kept) + 2
    answers = [replace(w, target=sink) if w.target == K + 1 else w for w in circuit.wires]
    num_leaves = circuit.in_spec.num_leaves
    ends = [
        Wire(SOURCE, num_leaves, number, last.num_inputs - 1, delay),
        Wire(number, last.num_outputs - 1, sink, circuit.out_spec.num_leaves, 0),
    ]
    return circuit.replace(
        stages=(*kept, last),
        wires=(*answers, *wires, *ends),
        in_spec=_with_one_more(circuit.in_spec),
        out_spec=_with_one_more(circuit.out_spec),
        periods=(),
        phases=(),
        example=None,
    )


def check_trainable(circuit: Circuit) -> None:
    """CircuitError, with the reason, for a circuit that the training rules do not know how to go back through."""
    if circuit.has_feedback:
        raise CircuitError("a circuit with feedback wires cannot be trained by ticks; take them out to train")
    if max(circuit.periods) > 1:
        raise CircuitError(f"periods {circuit.periods}: stages that hold their output cannot be trained by ticks")
    for number, stage in enumerate(circuit.stages, start=1):
        where = f"stage {number} ({stage.name})"
        if stage.delay_ticks:
            raise CircuitError(f"{where} looks ahead by {stage.delay_ticks} frames; only causal layers can be trained")
        if stage.backend != "eager":
            raise CircuitError(f"{where} runs on the back end {stage.backend!r}, which has no gradients; use eager")
    late = [w for w in circuit.wires_into(circuit.sink) if w.source == circuit.num_stages and w.delay]
    if late:
        raise CircuitError(f"{late[0]}: the last stage's answer must not wait; give that wire the delay 0")


def _fused_stage(circuit: Circuit, loss: Loss) -> tuple[Stage, list[Wire]]:
    """The last stage with the loss inside, and the wires that bring it the rest of the answer."""
    K, stage = circuit.num_stages, circuit.stages[-1]
    leaves: list[tuple[bool, int]] = []
    wires: list[Wire] = []
    for wire in circuit.wires_into(circuit.sink):
        if wire.source == K:
            leaves.append((True, wire.output))
        else:
            leaves.append((False, len(wires)))
            wires.append(replace(wire, target=K, input=stage.num_inputs + len(wires)))
    step = LossStep(loss, circuit.out_spec, tuple(leaves), with_gradients(stage), stage.num_inputs)
    num_inputs = stage.num_inputs + len(wires) + 1
    return replace(stage, step=step, num_inputs=num_inputs, num_outputs=stage.num_outputs + 1), wires


def _loss_stage(circuit: Circuit, loss: Loss) -> tuple[Stage, list[Wire]]:
    """The loss as a stage of its own, and the wires that bring it the answer in the tick in which it is made."""
    wires = [replace(w, target=circuit.sink) for w in circuit.wires_into(circuit.sink)]
    step = LossStep(loss, circuit.out_spec, tuple((False, n) for n in range(len(wires))))
    return Stage("loss", step, len(wires) + 1, 1), wires


def with_gradients(stage: Stage) -> Callable[[Values, State], tuple[Values, State]]:
    """The stage's step in the caller's gradient mode (steps of models that were cut turn gradients off)."""
    return getattr(stage.step, "with_gradients", stage.step)


def _with_one_more(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    return pytree.tree_structure((pytree.tree_unflatten([0] * spec.num_leaves, spec), 0))
