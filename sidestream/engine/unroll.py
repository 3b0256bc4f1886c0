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
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sidestream.circuit.ages import ages, lags_of, latency_ticks, look_ahead_ticks
from sidestream.circuit.build_stages import ModuleStep
from sidestream.circuit.stage import NOTHING, SOURCE, Stage, State, Values
from sidestream.circuit.wire import Circuit
from sidestream.engine.rules.forward import Forward
from sidestream.engine.rules.loss_stage import with_gradients
from sidestream.engine.tick import Cell, Fed, LineBack, Machine, Message
from sidestream.errors import CircuitError, LayoutError
from sidestream.types import Output

Way = Literal["auto", "ticks", "stages"]


@dataclass(frozen=True, slots=True)
class Trace:
    """What one stage wrote, in the ticks in which it wrote anything. Held outputs are written again."""

    outputs: tuple[Any, ...]
    """One per output, (B, N, ...) for N ticks."""
    ticks: tuple[int, ...]
    oldest_frames: tuple[int | None, ...]
    """Of each tick: the oldest frame that had a part in it; None where all were repeats of the last."""
    newest_frames: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Unrolled:
    """The answers of a clip, in the order of the frames that they are about."""

    answers: Any
    """In the model's own structure, each tensor (B, N, ...) for N answers."""
    ticks: tuple[int, ...]
    """The tick of each answer. In tick t frame t is the newest of the stream, as long as the clip lasts."""
    frame_indices: tuple[int, ...]
    """The frame that each is about: tick less ``latency_ticks``."""
    oldest_frames: tuple[int, ...]
    newest_frames: tuple[int, ...]
    """The oldest and the newest frame that had a part in each."""
    is_warm_up: tuple[bool, ...]
    traces: tuple[Trace, ...] = ()
    """One per stage, where asked for."""


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
        return _by_stages(circuit, clip_BTCHW, num_ticks, traced)
    return _by_ticks(circuit, clip_BTCHW, num_ticks, traced)


def reason_for_ticks(circuit: Circuit) -> str | None:
    """Why the circuit must go tick by tick; None where it may go stage by stage."""
    if circuit.has_feedback:
        return "it has feedback"
    if set(circuit.periods) != {1}:
        return f"its stages tick at the periods {circuit.periods}"
    for number, stage in enumerate(circuit.stages, start=1):
        if _clip_form(stage) is None:
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


# Stage by stage. Time is the first axis, so that a stretch of ticks is a view.


def _by_stages(circuit: Circuit, clip: Tensor, num_ticks: int, traced: bool) -> Unrolled:
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
        on_clip = _clip_form(stage)
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


def _clip_form(stage: Stage) -> Callable[[Values], Values] | None:
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
