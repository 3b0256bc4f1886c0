"""``unroll`` stage by stage: all ticks of a stage as one batch. Time is the first axis, so that a stretch is a view."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sidestream.circuit.ages import ages, lags_of, latency_ticks
from sidestream.circuit.build_stages import ModuleStep
from sidestream.circuit.stage import SOURCE, Stage, Values
from sidestream.circuit.wire import Circuit
from sidestream.engine.unrolled import Trace, Unrolled


def by_stages(circuit: Circuit, clip: Tensor, num_ticks: int, traced: bool) -> Unrolled:
    latency, num_frames = latency_ticks(circuit), clip.shape[1]
    starts, ends = _ticks_needed(circuit, num_ticks, everything=traced)
    frames_TB = clip.transpose(0, 1)
    if ends[SOURCE] > num_frames:
        repeats = frames_TB[-1:].expand(ends[SOURCE] - num_frames, *frames_TB.shape[1:])
        frames_TB = torch.cat([frames_TB, repeats])
    made: list[Values] = [(frames_TB[starts[SOURCE] : ends[SOURCE]],)]

    def read(number: int, start: int, end: int) -> Values:
        wires = circuit.wires_into(number)
        return tuple(made[w.source][w.output][start - w.delay - starts[w.source] :][: end - start] for w in wires)

    for number, stage in enumerate(circuit.stages, start=1):
        on_clip = clip_form(stage)
        assert on_clip is not None  # checked
        made.append(on_clip(read(number, starts[number], ends[number])))
    ticks = tuple(range(latency, num_ticks))
    answers = [leaf.transpose(0, 1) for leaf in read(circuit.sink, latency, num_ticks)]
    reached = ages(circuit)
    seen = [_seen(reached[-1], tick, num_frames) for tick in ticks]
    return Unrolled(
        pytree.tree_unflatten(answers, circuit.out_spec),
        ticks,
        tuple(tick - latency for tick in ticks),
        tuple(oldest for oldest, _ in seen),  # type: ignore[misc]  # an answered frame is in the clip
        tuple(newest for _, newest in seen),  # type: ignore[misc]
        (False,) * len(ticks),
        _traces(made, starts, num_ticks, num_frames, reached) if traced else (),
    )


def _ticks_needed(circuit: Circuit, num_ticks: int, *, everything: bool) -> tuple[list[int], list[int]]:
    """First tick of source and stages whose value an answer needs, and the one after the last.

    A stage with a state must begin where its input does. ``everything``: all that is ever written.
    """
    lags = lags_of(circuit)
    if everything:
        return [0, *lags[1:-1]], [num_ticks] * (len(lags) - 1)
    starts, ends = [num_ticks] * len(lags), [0] * len(lags)
    starts[-1], ends[-1] = lags[-1], num_ticks
    for number in reversed(range(1, len(lags))):
        if number <= circuit.num_stages and circuit.stages[number - 1].is_stateful:
            starts[number] = lags[number]
        for wire in circuit.wires_into(number):
            starts[wire.source] = min(starts[wire.source], starts[number] - wire.delay)
            ends[wire.source] = max(ends[wire.source], ends[number] - wire.delay)
    for number in range(len(lags)):  # a stage that nothing reads
        starts[number] = min(starts[number], ends[number])
    return starts, ends


def clip_form(stage: Stage) -> Callable[[Values], Values] | None:
    """All ticks of a stage at once, inputs and outputs (T, B, ...); None where it has no such form."""
    on_clip = getattr(stage.step, "on_clip", None)
    if on_clip is not None:
        return lambda inputs: tuple(y.transpose(0, 1) for y in on_clip(tuple(x.transpose(0, 1) for x in inputs)))
    if stage.is_stateful or not isinstance(stage.step, ModuleStep) or stage.num_inputs == 0:
        return None

    def folded(inputs: Values) -> Values:
        length = inputs[0].shape[:2]
        made, _ = stage.step(tuple(x.flatten(0, 1) for x in inputs), None)
        return tuple(y.unflatten(0, length) for y in made)

    return folded


def _traces(
    made: Sequence[Values], starts: Sequence[int], num_ticks: int, num_frames: int, reached: Sequence[frozenset[int]]
) -> tuple[Trace, ...]:
    traces = []
    for number in range(1, len(made)):
        ticks = tuple(range(starts[number], num_ticks))
        seen = [_seen(reached[number], tick, num_frames) for tick in ticks]
        outputs = tuple(y.transpose(0, 1) for y in made[number])
        traces.append(Trace(outputs, ticks, tuple(o for o, _ in seen), tuple(n for _, n in seen)))
    return tuple(traces)


def _seen(reached: frozenset[int], tick: int, num_frames: int) -> tuple[int | None, int | None]:
    """The oldest and the newest frame behind a value of this tick; repeats of the last frame do not count."""
    frames = [tick - age for age in reached if tick - age < num_frames]
    return min(frames, default=None), max(frames, default=None)
