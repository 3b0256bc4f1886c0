"""The machine by its answers: what a feedback wire holds while its stage writes nothing, against a plain loop."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

from sidestream.circuit.stage import NOTHING, Link, Stage, Stages, State, Values
from sidestream.circuit.wire import Circuit
from sidestream.circuit.wiring import sequential, with_feedback
from sidestream.engine import run

WRITES = [False, True, False, False, True, True, False, False, False, True, False]
"""The ticks in which the stage that is fed back writes something."""


def echo(delay: int) -> Circuit:
    """Stage 1 answers frame + 10 * what is fed back, and that is what stage 2 passes on, in some ticks only."""

    def add(inputs: Values, state: State) -> tuple[Values, State]:
        frame, fed_back = inputs
        return (frame + 10 * fed_back,), None

    def pass_on(inputs: Values, tick: State) -> tuple[Values, State]:
        return (inputs[0] if WRITES[tick] else NOTHING,), tick + 1

    stages = (Stage("add", add, 2, 1), Stage("pass on", pass_on, 1, 1, init_state=lambda: 0))
    links = (Link(0, 0, 1, 0), Link(0, 0, 1, 1), Link(0, 0, 2, 0), Link(1, 0, 3, 0))
    one = pytree.tree_structure(((torch.zeros(()),), {}))
    circuit = sequential(Stages(stages, links, one, pytree.tree_structure(0)))
    return with_feedback(circuit, source=2, output=0, target=1, input=1, initial=torch.tensor(7.0), delay=delay)


@pytest.mark.parametrize("executor", ["inline", "threads"])
@pytest.mark.parametrize("delay", [1, 2, 3])
def test_a_feedback_wire_holds_the_last_value_while_its_stage_writes_nothing(delay: int, executor: str) -> None:
    held, expected, is_warm_up = 7.0, [], []
    for tick in range(len(WRITES)):
        if tick >= delay and WRITES[tick - delay]:
            held = float(tick - delay)
        expected.append(tick + 10 * held)
        is_warm_up.append(not any(WRITES[: max(0, tick - delay + 1)]))
    frames = [torch.tensor(float(n)) for n in range(len(WRITES))]
    outputs = list(run(echo(delay), frames, executor=executor, num_threads=2))
    assert [float(out.value) for out in outputs] == expected
    assert [out.is_warm_up for out in outputs] == is_warm_up
