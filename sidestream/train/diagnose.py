"""How wrong are a rule's gradients? Each one beside the true gradient of the frame that its cotangent belongs to.

With frozen weights the rule and ``Exact`` run side by side on one clip. With weights that change, the true gradient is
autograd's through the whole net with the weights that it had at the beginning of the tick; the error then has a part
that is due to motion and one that is due to the updates made while the cotangent travelled.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor

from sidestream.circuit.ages import lags_of, mixes_ages
from sidestream.circuit.wire import Circuit
from sidestream.engine import run
from sidestream.engine.rules.exact import Exact
from sidestream.engine.rules.loss_stage import Loss
from sidestream.engine.rules.sideways import Sideways
from sidestream.engine.rules.trainer import OptimizerFactory, Update
from sidestream.engine.rules.training import StageGradient
from sidestream.errors import InputError
from sidestream.train.gradient_bound import ErrorBound, error_bounds, row_of
from sidestream.train.gradient_error import GradientError, Pairs, error_of
from sidestream.train.moving_weights import MakeRule, MovingWeights, Truth
from sidestream.train.undisturbed import undisturbed

Seen = dict[tuple[int, int | None], StageGradient]
"""By stage and frame of the cotangent."""


def gradient_errors(
    circuit: Circuit,
    frames: Sequence[Tensor],
    targets: Sequence[Any],
    loss: Loss,
    *,
    rule: MakeRule = Sideways,
    optimizers: OptimizerFactory | None = None,
    update: Update = "tick",
    target: str = "answered",
    bounds: bool = False,
    num_iterations: int = 4,
    state_ticks: int = 0,
    truth: Truth = nullcontext,
) -> list[GradientError]:
    """Errors of ``rule``'s gradients on one clip, by tick and stage; the net is left as it was (``undisturbed``).

    ``frames``: T tensors as the circuit takes them (batches of streams), ``targets``: one for each.
    ``optimizers``: None for frozen weights; else the stages are updated as ``update`` says while the clip runs.
    ``bounds``: fill in ``bound`` and ``motion_bound``, for rows of stages, frozen weights and answered targets.
    ``num_iterations``: of power iteration, in the bounds.
    ``state_ticks``: over how many ticks the true gradients cross the state of a stage (frozen weights).
    ``truth``: makes a context in which the net has its true gradients, where it has others outside (feedback weights).

    In a circuit whose skips mix ages, a gradient is about several frames; the true one is of the oldest.
    Raises CircuitError for stages with a state where weights change or ages mix, and InputError where a bound is
    asked for that there is not.
    """
    if len(frames) != len(targets):
        raise InputError(f"{len(frames)} frames but {len(targets)} targets; give one target for each frame")
    pairs = list(zip(frames, targets, strict=True))
    if bounds and (row_of(circuit) is None or optimizers is not None or target != "answered"):
        raise InputError(
            "bounds are for frozen weights (optimizers=None), target='answered', and a row of stages without state, "
            "each of which reads the one before and nothing else; leave them out (bounds=False)"
        )
    with undisturbed(circuit):
        if optimizers is None and not mixes_ages(circuit):
            exact = functools.partial(Exact, state_ticks=state_ticks)
            found = _frozen(circuit, pairs, loss, rule, target, exact, truth)
        else:
            found = MovingWeights(circuit, pairs, loss, target, truth).errors(
                rule, optimizers, update if optimizers else "manual"
            )
        if bounds:
            known, _ = error_bounds(
                circuit, frames, targets, loss, gaps_of(circuit, found), num_iterations=num_iterations
            )
            found = [_with_bound(each, known) for each in found]
    return sorted(found, key=lambda e: (e.tick, e.stage))


def _frozen(
    circuit: Circuit, pairs: Pairs, loss: Loss, make: MakeRule, target: str, exact: MakeRule, truth: Truth
) -> list[GradientError]:
    """Both rules tick by tick, so that only the gradients of the ticks between the two are held."""
    pseudo: Seen = {}
    true: Seen = {}

    def start(make: MakeRule, seen: Seen) -> Iterator[Any]:
        def observe(each: StageGradient) -> None:
            seen[each.stage, each.cotangent_frame] = each

        rule = make(loss, optimizers=None, update="manual", target=target, observe=observe)
        return run(circuit, pairs, rule=rule, executor="inline")

    found = []
    runs = start(make, pseudo), start(exact, true)
    is_running = True
    while is_running:
        is_running = next(runs[0], None) is not None
        with truth():
            is_running |= next(runs[1], None) is not None
        for key in pseudo.keys() & true.keys():
            found.append(error_of(pseudo.pop(key), true.pop(key).gradients, pairs, 0.0))
    return found


def gaps_of(circuit: Circuit, found: Sequence[GradientError]) -> list[int]:
    """By how many frames each stage's input is newer than its cotangent, also of stages without parameters."""
    K, lags = circuit.num_stages, lags_of(circuit)
    if all(each.age_gap == 0 for each in found):
        return [0] * K
    gaps = [lags[K] - lags[n] + K - n for n in range(1, K + 1)]  # there and back, a tick per wire
    delay = found[0].age_gap - gaps[found[0].stage - 1]
    return [gap + delay for gap in gaps]


def _with_bound(each: GradientError, known: dict[tuple[int, int], ErrorBound]) -> GradientError:
    found = known[each.stage, each.cotangent_frame]
    return replace(each, bound=found.bound, motion_bound=found.motion_bound)
