"""Fine stages put together: each row of them runs as one stage, its parts one behind the other.

fine      1   2   3   4   5          starts = 0, 2, 3
stages   [1   2] [3] [4   5]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.utils import _pytree as pytree

from sidestream.circuit.stage import NOTHING, SOURCE, Link, Stage, Stages, State, Values

Place = tuple[int, int]
"""A value inside of a row: (part, output); part 0 is what the row is given."""


def grouped(fine: Stages, starts: Sequence[int]) -> Stages:
    """The stages that begin at the fine ones ``starts`` (counted from 0, the first one is 0)."""
    ends = [*starts[1:], len(fine)]
    rows = [range(start + 1, end + 1) for start, end in zip(starts, ends)]
    row_of = {SOURCE: 0} | {part: number for number, row in enumerate(rows, start=1) for part in row}
    row_of[len(fine) + 1] = len(rows) + 1
    made: dict[Place, Place] = {(SOURCE, n): (SOURCE, n) for n in range(fine.in_spec.num_leaves)}
    stages, links = [], []
    for number, row in enumerate(rows, start=1):
        given = dict.fromkeys((k.source, k.output) for k in _into(fine, row) if row_of[k.source] < number)
        shown = dict.fromkeys((k.source, k.output) for k in fine.links if k.source in row and k.target not in row)
        inputs, outputs = {place: n for n, place in enumerate(given)}, list(shown)
        stages.append(_row(fine, row, inputs, outputs))
        links += [Link(*made[place], number, n) for place, n in inputs.items()]
        made |= {place: (number, n) for n, place in enumerate(outputs)}
    last = _into(fine, range(len(fine) + 1, len(fine) + 2))
    links += [Link(*made[k.source, k.output], len(rows) + 1, k.input) for k in last]
    return Stages(tuple(stages), tuple(links), fine.in_spec, fine.out_spec, fine.name, fine.input_spec, fine.example)


def in_a_row(parts: Sequence[Stages], in_spec: pytree.TreeSpec) -> Stages:
    """Stages behind each other: what one answers is what the next is given, leaf by leaf."""
    given: list[Place] = [(SOURCE, n) for n in range(parts[0].in_spec.num_leaves)]
    stages: list[Stage] = []
    links: list[Link] = []
    for part in parts:
        before, last = len(stages), len(part) + 1
        answer: dict[int, Place] = {}
        for k in part.links:
            source = given[k.output] if k.source == SOURCE else (before + k.source, k.output)
            if k.target == last:
                answer[k.input] = source
            else:
                links.append(Link(*source, before + k.target, k.input))
        stages += part.stages
        given = [answer[n] for n in range(len(answer))]
    links += [Link(*place, len(stages) + 1, n) for n, place in enumerate(given)]
    return Stages(tuple(stages), tuple(links), in_spec, parts[-1].out_spec)


@dataclass(frozen=True, eq=False)
class RowStep:
    """``step`` of a stage that is a row of parts; its state is a tuple with one entry per part."""

    parts: tuple[Stage, ...]
    reads: tuple[tuple[Place, ...], ...]
    """What each part is given."""
    gives: tuple[Place, ...]
    """What the row hands on."""

    def __call__(self, inputs: Values, state: State) -> tuple[Values, State]:
        return self._run(inputs, state, [part.step for part in self.parts])

    def with_gradients(self, inputs: Values, state: State) -> tuple[Values, State]:
        """The same step in whatever gradient mode it is called in: what training calls."""
        return self._run(inputs, state, [getattr(part.step, "with_gradients", part.step) for part in self.parts])

    def _run(self, inputs: Values, state: State, steps: Sequence[object]) -> tuple[Values, State]:
        values, after = [inputs], []
        for part, step, reads, own in zip(self.parts, steps, self.reads, self._states(state)):
            given = tuple(values[part][output] for part, output in reads)
            if any(value is NOTHING for value in given):
                made = (NOTHING,) * part.num_outputs
            else:
                made, own = step(given, own)  # type: ignore[operator]
            values.append(made)
            after.append(own)
        return tuple(values[part][output] for part, output in self.gives), None if state is None else tuple(after)

    def _states(self, state: State) -> Sequence[State]:
        return (None,) * len(self.parts) if state is None else state

    def init_state(self) -> State:
        """Of a new stream."""
        return tuple(None if part.init_state is None else part.init_state() for part in self.parts)

    def finish(self, state: State) -> list[Values]:
        """What each part still owes goes through the ones behind it, before they end themselves."""
        late: list[dict[int, Values]] = []
        for number, (part, reads, own) in enumerate(zip(self.parts, self.reads, self._states(state)), start=1):
            behind = []
            for values in late:
                made, own = part.step(tuple(values[part][output] for part, output in reads), own)
                if not any(value is NOTHING for value in made):
                    behind.append({**values, number: made})
            owed = [] if part.finish is None else part.finish(own)
            late = [*behind, *({number: tuple(made)} for made in owed)]
        return [tuple(values[part][output] for part, output in self.gives) for values in late]

    def guard(self) -> None:
        """All guards of the parts."""
        for part in self.parts:
            if part.guard is not None:
                part.guard()


def _into(fine: Stages, targets: range) -> list[Link]:
    return sorted((k for k in fine.links if k.target in targets), key=lambda k: (k.target, k.input))


def _row(fine: Stages, row: range, inputs: dict[Place, int], outputs: list[Place]) -> Stage:
    parts = tuple(fine[part - 1] for part in row)
    is_whole = len(outputs) == parts[0].num_outputs and len(inputs) == parts[0].num_inputs
    if len(parts) == 1 and is_whole and outputs == sorted(outputs):
        return parts[0]
    inside = {part: number for number, part in enumerate(row, start=1)}

    def place(at: Place) -> Place:
        return (inside[at[0]], at[1]) if at[0] in inside else (0, inputs[at])

    reads = tuple(tuple(place((k.source, k.output)) for k in _into(fine, range(p, p + 1))) for p in row)
    step = RowStep(parts, reads, tuple(place(at) for at in outputs))
    is_stateful = any(part.is_stateful for part in parts)
    first, last = parts[0], parts[-1]
    return Stage(
        name=first.name if len(parts) == 1 else f"{first.name.split('-')[0]}-{last.name.split('-')[-1]}",
        step=step,
        num_inputs=len(inputs),
        num_outputs=len(outputs),
        init_state=step.init_state if is_stateful else None,
        finish=step.finish if any(part.finish is not None for part in parts) else None,
        delay_ticks=last.delay_ticks,
        period_ticks=last.period_ticks,
        input_period_ticks=first.input_period_ticks,
        cost_seconds=_seconds(parts),
        output_bytes=_sizes(parts, step.gives),
        calls_modules=any(part.calls_modules for part in parts),
        draws=any(part.draws for part in parts),
        module=nn.ModuleList([part.module for part in parts]),
        example_inputs=_example(parts, step.reads, len(inputs)),
        guard=step.guard if any(part.guard is not None for part in parts) else None,
    )


def _seconds(parts: Sequence[Stage]) -> float | None:
    """Of the mean tick: a part behind a temporal stride works in some only."""
    total, period = 0.0, parts[0].input_period_ticks
    for part in parts:
        if part.cost_seconds is None:
            return None
        total += part.cost_seconds * period / part.input_period_ticks
    return total


def _sizes(parts: Sequence[Stage], gives: Sequence[Place]) -> tuple[int, ...] | None:
    sizes = []
    for number, output in gives:
        made = parts[number - 1].output_bytes
        if made is None:
            return None
        sizes.append(made[output])
    return tuple(sizes)


def _example(parts: Sequence[Stage], reads: Sequence[Sequence[Place]], num_inputs: int) -> Values | None:
    example: list[object] = [None] * num_inputs
    for part, places in zip(parts, reads):
        for n, (source, output) in enumerate(places):
            if source == 0:
                if part.example_inputs is None:
                    return None
                example[output] = part.example_inputs[n]
    return tuple(example)
