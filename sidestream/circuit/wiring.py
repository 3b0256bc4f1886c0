"""Wirings: ways to give the links of a cut model their delays. Each turns ``Stages`` into a ``Circuit``.

    sequential      0 everywhere                          the ordinary model, all stages on the same frame
    pipelined       as many ticks as cuts are crossed     the same answers, K - 1 ticks later, stages in parallel
    semi_parallel   the same, by groups of stages         sequential inside a group, parallel between groups
    parallel        1 on every stage-to-stage wire        skips bring newer frames: another function than the model,
                                                          with the answer to the newest frame sooner

``parallel`` follows Massively Parallel Video Networks (Carreira, Patraucean et al., ECCV 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sidestream.circuit.ages import lags_of
from sidestream.circuit.balance import partition
from sidestream.circuit.stage import SOURCE, Link, Stages
from sidestream.circuit.wire import Circuit, Wire
from sidestream.errors import CircuitError


def sequential(stages: Stages) -> Circuit:
    """Every stage works on the newest frame, one after the other, in the same tick."""
    return _aligned(stages, [0] * len(stages), "sequential")


def pipelined(stages: Stages) -> Circuit:
    """Stage j works on the frame of j - 1 ticks ago. No number changes: the model's answers, K - 1 ticks later."""
    return _aligned(stages, list(range(len(stages))), "pipelined")


def semi_parallel(stages: Stages, *, groups: int | Sequence[int], skips: str = "aligned") -> Circuit:
    """Stages in G consecutive groups: sequential inside a group, a register between groups.

    ``groups``: their number (cut so that the largest group costs least), or the number of stages in each.
    ``skips``: "aligned" delays every wire by the groups it crosses (the model's own answers, G - 1 ticks later);
    "fresh" delays every wire between groups by 1.
    """
    group_of = _groups(stages, groups)
    num_groups = group_of[-1] + 1
    if skips == "aligned":
        return _aligned(stages, group_of, f"semi-parallel({num_groups})")
    if skips == "fresh":
        return _fresh(stages, group_of, f"semi-parallel({num_groups}), fresh skips")
    raise CircuitError(f"skips={skips!r}; expected 'aligned' or 'fresh'")


def parallel(stages: Stages, *, equalise_skips: bool = False) -> Circuit:
    """Every stage reads what its inputs' stages wrote one tick ago; the frame itself is read fresh by all.

    With ``equalise_skips`` every wire waits until its frame fits the trunk's: that is ``pipelined``.
    """
    if equalise_skips:
        return pipelined(stages).replace(wiring="parallel, equalised skips")
    return _fresh(stages, list(range(len(stages))), "parallel")


def with_periods(circuit: Circuit, periods: Sequence[int], *, phases: Sequence[int] | None = None) -> Circuit:
    """Multi-rate clocks: stage j computes every periods[j - 1] ticks and holds its output in between.

    Periods grow or stay with depth. Default phases let each stage compute when frame 0 reaches it.
    """
    if len(periods) != circuit.num_stages:
        raise CircuitError(f"{len(periods)} periods for {circuit.num_stages} stages; give one for each stage")
    lags = lags_of(circuit)[1:-1]
    chosen = [lag % max(p, 1) for lag, p in zip(lags, periods, strict=True)] if phases is None else phases
    return circuit.replace(periods=tuple(periods), phases=tuple(chosen), wiring=f"{circuit.wiring}, multi-rate")


def with_feedback(
    circuit: Circuit, *, source: int, output: int, target: int, input: int, initial: Any, delay: int = 1
) -> Circuit:
    """Replace the wire into (target, input) by one that runs back from (source, output), ``delay`` ticks later."""
    kept = tuple(w for w in circuit.wires if (w.target, w.input) != (target, input))
    if len(kept) == len(circuit.wires):
        raise CircuitError(f"stage {target} has no input {input} to feed back into")
    wire = Wire(source, output, target, input, delay, initial)
    return circuit.replace(wires=(*kept, wire), wiring=f"{circuit.wiring}, feedback")


WIRINGS: dict[str, Callable[[Stages], Circuit]] = {
    "sequential": sequential,
    "pipelined": pipelined,
    "parallel": parallel,
}


def wire(stages: Stages, wiring: str) -> Circuit:
    """A wiring by name: sequential, pipelined, parallel, or semi-parallel:G (or semi-parallel:G:fresh) in G groups."""
    if wiring in WIRINGS:
        return WIRINGS[wiring](stages)
    kind, _, rest = wiring.partition(":")
    groups, _, skips = rest.partition(":")
    if kind in ("semi-parallel", "semi_parallel") and groups.isdigit() and skips in ("", "aligned", "fresh"):
        return semi_parallel(stages, groups=int(groups), skips=skips or "aligned")
    known = f"{', '.join(WIRINGS)}, semi-parallel:G or semi-parallel:G:fresh"
    raise CircuitError(f"unknown wiring {wiring!r}; expected one of {known}")


def _aligned(stages: Stages, lags: Sequence[int], wiring: str) -> Circuit:
    """Delay = difference of lags, so that all inputs of a stage belong to one frame."""
    full = [0, *lags, lags[-1]]  # source, stages, sink
    return _circuit(stages, lambda k: full[k.target] - full[k.source], wiring)


def _fresh(stages: Stages, group_of: Sequence[int], wiring: str) -> Circuit:
    """One tick between groups, none inside a group, from the source, or to the sink."""

    def delay(link: Link) -> int:
        if link.source == SOURCE or link.target == len(stages) + 1:
            return 0
        return int(group_of[link.target - 1] != group_of[link.source - 1])

    return _circuit(stages, delay, wiring)


def _circuit(stages: Stages, delay: Callable[[Link], int], wiring: str) -> Circuit:
    wires = tuple(Wire(k.source, k.output, k.target, k.input, delay(k)) for k in stages.links)
    return Circuit(
        stages.stages,
        wires,
        stages.in_spec,
        stages.out_spec,
        wiring=wiring,
        name=stages.name,
        input_spec=stages.input_spec,
        example=stages.example,
    )


def _groups(stages: Stages, groups: int | Sequence[int]) -> list[int]:
    """Group number (from 0) of every stage."""
    K = len(stages)
    if isinstance(groups, int):
        if not 1 <= groups <= K:
            raise CircuitError(f"groups={groups} for {K} stage{'s' * (K > 1)}; expected 1..{K}")
        costs = [s.cost_seconds if s.cost_seconds is not None else 1.0 for s in stages]
        boundaries = partition(costs, groups)
        return [sum(number >= b for b in boundaries) for number in range(K)]
    if sum(groups) != K or any(size < 1 for size in groups):
        raise CircuitError(f"groups={tuple(groups)} do not add up to {K} stages of at least one each")
    return [g for g, size in enumerate(groups) for _ in range(size)]
