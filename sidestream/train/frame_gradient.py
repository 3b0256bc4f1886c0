"""The true gradient of one frame's loss, by autograd through the circuit unrolled in time."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sidestream.circuit.ages import latency_ticks
from sidestream.circuit.stage import SOURCE
from sidestream.circuit.wire import Circuit
from sidestream.engine.rules.loss_stage import Loss, with_gradients
from sidestream.engine.rules.place import parameters_of
from sidestream.engine.rules.stage_backward import Gradients
from sidestream.train.gradient_error import Pairs


def frame_gradients(circuit: Circuit, pairs: Pairs, loss: Loss, frame: int, target: int) -> list[Gradients]:
    """One dict per stage, of the loss of the answer to ``pairs[frame]`` against the target of ``pairs[target]``.

    For circuits whose stages have no state. A stage that is used at several ticks for that answer (skips that mix
    ages) has the sum over them; past the end of the clip its last frame is repeated.
    """

    @functools.cache
    def outputs(number: int, tick: int) -> tuple[Any, ...]:
        if number == SOURCE:
            return tuple(pytree.tree_leaves(pairs[min(tick, len(pairs) - 1)][0]))
        return with_gradients(circuit.stages[number - 1])(inputs(number, tick), None)[0]

    def inputs(number: int, tick: int) -> tuple[Any, ...]:
        return tuple(outputs(w.source, tick - w.delay)[w.output] for w in circuit.wires_into(number))

    with torch.enable_grad():
        leaves = inputs(circuit.sink, frame + latency_ticks(circuit))
        value = loss(pytree.tree_unflatten(leaves, circuit.out_spec), pairs[target][1])
    own = parameters_of(circuit.stages)
    wanted = [p for named in own for p in named.values()]
    found = iter(torch.autograd.grad(value.reshape(()), wanted, allow_unused=True))
    return [{name: g for name, g in zip(named, found) if g is not None} for named in own]
