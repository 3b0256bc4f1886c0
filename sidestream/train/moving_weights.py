"""Errors of a rule's gradients while the weights change: against the whole net as it was when the tick began."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from sidestream.circuit.ages import lags_of, latency_ticks
from sidestream.circuit.wire import Circuit
from sidestream.engine import run
from sidestream.engine.rules.loss_stage import Loss
from sidestream.engine.rules.place import parameters_of
from sidestream.engine.rules.stage_backward import Gradients
from sidestream.engine.rules.trainer import OptimizerFactory, Update
from sidestream.engine.rules.training import StageGradient, TrainingRule
from sidestream.errors import CircuitError
from sidestream.train.frame_gradient import frame_gradients
from sidestream.train.gradient_error import GradientError, Pairs, error_of

MakeRule = Callable[..., TrainingRule]
"""``Sideways``, ``Exact``, or a ``functools.partial`` of one with its options."""
Truth = Callable[[], AbstractContextManager[Any]]
"""Makes a context in which a net has its true gradients."""
Weights = list[list[Tensor]]
"""A copy of each stage's parameters."""


@dataclass
class MovingWeights:
    """One clip in which the weights change, as an observer of the rule. Looks at a tick when the next one begins."""

    circuit: Circuit
    pairs: Pairs
    loss: Loss
    target: str
    truth: Truth = nullcontext
    tick: int = -1
    seen: list[StageGradient] = field(default_factory=list)
    """Of this tick."""
    found: list[GradientError] = field(default_factory=list)

    def __post_init__(self) -> None:
        if any(stage.init_state is not None for stage in self.circuit.stages):
            raise CircuitError(
                "a circuit whose stages have a state has no true gradient of single frames while its weights change; "
                "diagnose it with frozen weights (optimizers=None)"
            )
        self.own: list[list[Parameter]] = [list(p.values()) for p in parameters_of(self.circuit.stages)]
        self.lags = lags_of(self.circuit)
        self.newer = latency_ticks(self.circuit) if self.target == "newest" else 0
        self.past: list[deque[tuple[int, list[Tensor]]]] = [deque() for _ in self.own]
        """Per stage: ticks, and the weights at their beginning, back to the frame whose cotangent comes next."""

    def errors(self, make: MakeRule, optimizers: OptimizerFactory | None, update: Update) -> list[GradientError]:
        options: dict[str, Any] = {"optimizers": optimizers, "update": update, "target": self.target}
        rule = make(self.loss, observe=self.observe, **options)
        for _ in run(self.circuit, self.pairs, rule=rule, executor="inline"):
            pass
        self._look()
        return self.found

    def observe(self, each: StageGradient) -> None:
        """Stages work in order of depth, and are updated after this: at the first of a tick no weight has changed."""
        if each.tick > self.tick:
            self._look()
            self.tick = each.tick
            for past, own in zip(self.past, self.own, strict=True):
                past.append((self.tick, [p.detach().clone() for p in own]))
        self.seen.append(each)

    def _look(self) -> None:
        """Compare what was seen in the last tick, with the weights of its beginning."""
        seen, self.seen = self.seen, []
        if not seen:
            return
        weights = [past[-1][1] for past in self.past]
        for each in seen:
            true = self._true(each, weights)
            if true is not None:
                change = self._change(each, weights[each.stage - 1])
                self.found.append(error_of(each, true, self.pairs, change))

    def _true(self, each: StageGradient, weights: Weights) -> Gradients | None:
        frame = each.cotangent_frame or 0
        if frame + self.newer >= len(self.pairs):
            return None
        parameters = [p for own in self.own for p in own]
        current = [p.data for p in parameters]
        for p, w in zip(parameters, (w for own in weights for w in own), strict=True):
            p.data = w
        try:
            with self.truth():
                found = frame_gradients(self.circuit, self.pairs, self.loss, frame, frame + self.newer)
        finally:
            for p, data in zip(parameters, current, strict=True):
                p.data = data
        return found[each.stage - 1]

    def _change(self, each: StageGradient, now: list[Tensor]) -> float:
        """Since the tick in which the stage went forward on the cotangent's frame; what is older is forgotten."""
        past, forward_tick = self.past[each.stage - 1], (each.cotangent_frame or 0) + self.lags[each.stage]
        while len(past) > 1 and past[0][0] < forward_tick:
            past.popleft()
        squares = [(a - b).double().square().sum() for a, b in zip(now, past[0][1], strict=True)]
        return math.sqrt(sum(map(float, squares)))
