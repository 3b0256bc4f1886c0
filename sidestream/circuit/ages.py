"""Which frames reach which stage: pure arithmetic on wires, known before anything runs.

The ages at a stage are the numbers of ticks by which the frames in its input are older than the newest frame:

    A(source) = {0}      A(j) = union over the wires (i -> j, d) of A(i) + d

    latency_ticks             = max A(sink)   ticks until every path has seen a frame: the answered frame's age
    information_latency_ticks = min A(sink)   ticks until a frame can first influence an answer

Feedback wires are left out: what they bring is older still, without end.
"""

from __future__ import annotations

from sidestream.circuit.wire import Circuit


def ages(circuit: Circuit) -> tuple[frozenset[int], ...]:
    """Ages at source, stages 1..K and sink (K + 2 entries). A stage that reads nothing has no age."""
    reached: list[frozenset[int]] = [frozenset({0})]
    for number in range(1, circuit.num_stages + 2):
        incoming = (w for w in circuit.wires_into(number) if not w.is_feedback)
        reached.append(frozenset(age + w.delay for w in incoming for age in reached[w.source]))
    return tuple(reached)


def lags_of(circuit: Circuit) -> tuple[int, ...]:
    """The oldest age at source, stages 1..K and sink: the frame on which each "is working"."""
    return tuple(max(a, default=0) for a in ages(circuit))


def latency_ticks(circuit: Circuit) -> int:
    """Ticks from a frame's arrival to the first answer in which every path has seen it."""
    return max(ages(circuit)[-1], default=0)


def information_latency_ticks(circuit: Circuit) -> int:
    """Ticks from a frame's arrival to the first answer on which it has any influence."""
    return min(ages(circuit)[-1], default=0)


def look_ahead_ticks(circuit: Circuit) -> int:
    """Further ticks that an answer waits because layers inside of the stages look ahead."""
    return max(
        (circuit.stages[w.source - 1].delay_ticks for w in circuit.wires_into(circuit.sink) if w.source), default=0
    )


def mixes_ages(circuit: Circuit) -> bool:
    """Whether some stage, or the answer, sees frames of different ages at once."""
    return any(len(a) > 1 for a in ages(circuit))
