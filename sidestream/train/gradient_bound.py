"""A bound on the error of Sideways' gradients, from constants measured on the clip; derived in docs/training.md.

For a row of stages H_i with frozen weights: h_i(s) is stage i's answer to frame s, J_i its Jacobian in its input, P_i
the one in its parameters, c_i(s) the true cotangent of h_i(s) and c~_i(s) the one that Sideways has. Stage i works at
frame s' = s + gap_i. Adding and subtracting J_i(s')^T c_i(s) gives

    c~_(i-1) - c_(i-1)  =  J_i(s')^T (c~_i - c_i)  +  [J_i(s') - J_i(s)]^T c_i       (with P_i: the error)
    b_(i-1)             =  gain_i b_i              +  |[J_i(s') - J_i(s)]^T c_i|,      b_i >= |c~_i - c_i|

``gain`` is a power iteration that begins at the very difference c~_i - c_i. Its steps never fall, so however few there
are, gain_i |c~_i - c_i| >= |J_i(s')^T (c~_i - c_i)|, and the inequality holds (up to rounding).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sidestream.circuit.stage import SOURCE, Stage
from sidestream.circuit.wire import Circuit
from sidestream.engine.rules.loss_stage import Loss, with_gradients
from sidestream.engine.rules.place import parameters_of
from sidestream.train.jacobians import JacobiansAt, Tensors, norm_of


@dataclass(frozen=True, slots=True)
class ErrorBound:
    """Of one stage's gradient for one frame; norms, not relative."""

    bound: float
    """From what was measured for this frame at this stage and those above it."""
    motion_bound: float
    """Sum over the stages above of (constants of the clip) x |change of the input frame over that stage's gap|."""


@dataclass(slots=True)
class StageConstants:
    """The largest values of one stage on a clip. True of what was seen there; for other frames they are estimates."""

    gain: float = 0.0
    """Of J^T, by power iteration: at most, and in the limit equal to, its spectral norm."""
    parameter_gain: float = 0.0
    """The same of P^T."""
    jacobian_slope: float = 0.0
    """|[J(a) - J(b)]^T c| / (|a - b| |c|) between inputs a and b seen: the Lipschitz constant of J along c."""
    parameter_slope: float = 0.0
    """The same of P."""
    slope: float = 0.0
    """|H(a) - H(b)| / |a - b| between inputs seen: the stage's own Lipschitz constant."""
    cotangent: float = 0.0
    """|c|."""


def row_of(circuit: Circuit) -> tuple[Stage, ...] | None:
    """The stages, where each reads the one before and nothing else, and none has a state; None for other circuits."""
    ends = [(w.source, w.output, w.target, w.input) for w in circuit.wires]
    in_a_row = sorted(ends) == [(n, 0, n + 1, 0) for n in range(SOURCE, circuit.num_stages + 1)]
    is_row = in_a_row and all(stage.init_state is None for stage in circuit.stages)
    return circuit.stages if is_row else None


def error_bounds(
    circuit: Circuit,
    frames: Sequence[Tensor],
    targets: Sequence[Any],
    loss: Loss,
    gaps: Sequence[int],
    *,
    num_iterations: int = 4,
) -> tuple[dict[tuple[int, int], ErrorBound], list[StageConstants]]:
    """Bounds by (stage, frame), and the constants of each stage. ``gaps[i - 1]``: frames by which stage i is ahead.

    ``circuit`` must be a row (``row_of``). Only frames s with s + gap inside the clip have a bound.
    """
    clip = _Clip(circuit, frames, targets, loss, gaps)
    constants = [StageConstants() for _ in circuit.stages]
    bounds: dict[tuple[int, int], float] = {}
    for frame in range(len(frames)):
        for seen in clip.descend(frame, num_iterations):
            _widen(constants[seen.stage - 1], seen)
            bounds[seen.stage, frame] = seen.bound
    clip.widen_slopes(constants)
    found = {key: ErrorBound(bound, clip.motion_bound(*key, constants)) for key, bound in bounds.items()}
    return found, constants


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was measured at one stage for one frame."""

    stage: int
    bound: float
    gain: float
    parameter_gain: float
    jacobian_change: float
    parameter_change: float
    input_change: float
    cotangent: float


class _Clip:
    """The values of a row on a clip, and its Sideways worked out frame by frame instead of tick by tick."""

    def __init__(
        self, circuit: Circuit, frames: Sequence[Tensor], targets: Sequence[Any], loss: Loss, gaps: Sequence[int]
    ) -> None:
        self.steps = [with_gradients(stage) for stage in circuit.stages]
        self.parameters = [tuple(own.values()) for own in parameters_of(circuit.stages)]
        self.gaps, self.loss, self.targets, self.out_spec = gaps, loss, targets, circuit.out_spec
        self.values: list[list[Tensor]] = []
        """By stage (0: the frames) and frame."""
        self.values.append([frame.detach() for frame in frames])
        with torch.no_grad():
            for step in self.steps:
                self.values.append([step((value,), None)[0][0].detach() for value in self.values[-1]])

    def descend(self, frame: int, num_iterations: int) -> list[_Seen]:
        """From the loss of a frame down the stages, as far as the clip has the frames that are ahead."""
        true = pseudo = self._loss_cotangent(frame)
        bound, found = 0.0, []
        for stage in range(len(self.steps), 0, -1):
            ahead = frame + self.gaps[stage - 1]
            if ahead >= len(self.values[0]):
                break
            here = JacobiansAt(self.steps[stage - 1], self.parameters[stage - 1], self.values[stage - 1][frame])
            there = JacobiansAt(self.steps[stage - 1], self.parameters[stage - 1], self.values[stage - 1][ahead])
            error = pseudo - true
            start = error if bool(error.any()) else true
            gain = there.gain(start, 0, num_iterations) if stage > 1 else 0.0
            parameter_gain = there.gain(start, 1, num_iterations)
            true_pull, pull = here.pull(true), there.pull(true)
            change, parameter_change = (norm_of(_minus(a, b)) for a, b in zip(pull, true_pull, strict=True))
            found.append(
                _Seen(
                    stage,
                    parameter_gain * bound + parameter_change,
                    gain,
                    parameter_gain,
                    change,
                    parameter_change,
                    norm_of((self.values[stage - 1][ahead] - self.values[stage - 1][frame],)),
                    norm_of((true,)),
                )
            )
            bound = gain * bound + change
            if stage > 1:
                true, pseudo = true_pull[0][0], there.pull(pseudo)[0][0]
        return found

    def widen_slopes(self, constants: Sequence[StageConstants]) -> None:
        """Stage m carries the change over every gap of a stage above it, so its slope is taken over all of those."""
        num_frames = len(self.values[0])
        for m in range(1, len(self.steps)):
            for gap in {g for g in self.gaps[m:] if g}:
                for s in range(num_frames - gap):
                    before = norm_of((self.values[m - 1][s + gap] - self.values[m - 1][s],))
                    after = norm_of((self.values[m][s + gap] - self.values[m][s],))
                    if before:
                        constants[m - 1].slope = max(constants[m - 1].slope, after / before)

    def motion_bound(self, stage: int, frame: int, constants: Sequence[StageConstants]) -> float:
        """The same recursion with the clip's constants, and the input's change carried up to each stage."""
        bound, result = 0.0, 0.0
        for number in range(len(self.steps), stage - 1, -1):
            own = constants[number - 1]
            moved = norm_of((self.values[0][frame + self.gaps[number - 1]] - self.values[0][frame],))
            moved *= math.prod(below.slope for below in constants[: number - 1])
            result = own.parameter_gain * bound + own.parameter_slope * own.cotangent * moved
            bound = own.gain * bound + own.jacobian_slope * own.cotangent * moved
        return result

    def _loss_cotangent(self, frame: int) -> Tensor:
        out = self.values[-1][frame].clone().requires_grad_()
        loss = self.loss(pytree.tree_unflatten([out], self.out_spec), self.targets[frame])
        return torch.autograd.grad(loss.reshape(()), out)[0]


def _widen(constants: StageConstants, seen: _Seen) -> None:
    constants.gain = max(constants.gain, seen.gain)
    constants.parameter_gain = max(constants.parameter_gain, seen.parameter_gain)
    constants.cotangent = max(constants.cotangent, seen.cotangent)
    if scale := seen.input_change * seen.cotangent:
        constants.jacobian_slope = max(constants.jacobian_slope, seen.jacobian_change / scale)
        constants.parameter_slope = max(constants.parameter_slope, seen.parameter_change / scale)


def _minus(a: Tensors, b: Tensors) -> Tensors:
    return tuple(x - y for x, y in zip(a, b, strict=True))
