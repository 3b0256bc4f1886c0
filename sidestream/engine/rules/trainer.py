"""The training of one stage: gradients gathered over ticks, and its own optimiser, stepped when the policy says so.

Policies: "tick" (after every gradient), a number N (after every N gradients), "clip" (when the stream ends), "manual"
(when asked). A step takes the mean of the gradients since the last one. Without a gradient there is no step: fill-up
ticks change nothing, not even by weight decay or momentum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from sidestream.engine.rules.stage_backward import Gradients
from sidestream.errors import InputError

OptimizerFactory = Callable[[Iterable[Parameter]], Optimizer]
"""Makes the optimiser of one stage from its parameters: ``functools.partial(torch.optim.SGD, lr=0.1)``."""
Update = int | str
UPDATES = ("tick", "clip", "manual")


def check_update(update: Update, max_norm: float | None) -> None:
    """InputError for a policy or a norm that does not exist."""
    if not (update in UPDATES or (type(update) is int and update >= 1)):
        raise InputError(f"{update = }; expected one of {', '.join(UPDATES)}, or a number of ticks from 1 on")
    if max_norm is not None and not max_norm > 0:
        raise InputError(f"{max_norm = }; expected a gradient norm above 0, or None for no clipping")


class StageTrainer:
    """Parameters, gradients and optimiser of one stage. Only the stage's own firing touches it while a run is on."""

    def __init__(
        self,
        parameters: dict[str, Parameter],
        *,
        optimizers: OptimizerFactory | None,
        update: Update,
        max_norm: float | None,
    ) -> None:
        self.parameters = parameters
        self.every = 1 if update == "tick" else update
        self.max_norm = max_norm
        self.optimizer = optimizers(list(parameters.values())) if optimizers and parameters else None
        self.num_gathered = 0
        """Ticks whose gradients have been gathered since the last step."""
        self.num_updates = 0
        self.latest: Gradients = {}
        """Mean gradient of the last update, as the optimiser was given it (clipped)."""
        self._sums: Gradients = {}

    def gather(self, gradients: Gradients) -> None:
        """Add one tick's gradients, and step where the policy says so."""
        for name, gradient in gradients.items():
            self._sums[name] = self._sums[name] + gradient if name in self._sums else gradient
        self.num_gathered += 1
        if self.num_gathered == self.every:
            self.step(self.num_gathered)

    def step(self, count: int) -> None:
        """Step with what was gathered, divided by ``count``; nothing where there is none."""
        if not self.num_gathered:
            return
        mean = self.mean(count)
        self.zero()
        for name, gradient in mean.items():
            self.parameters[name].grad = gradient
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.max_norm)
        if self.optimizer is not None:
            self.optimizer.step()
        for parameter in self.parameters.values():
            parameter.grad = None
        self.latest = mean
        self.num_updates += 1

    def mean(self, count: int) -> Gradients:
        """What was gathered since the last step, divided by ``count``."""
        return {name: total / count if count > 1 else total.clone() for name, total in self._sums.items()}

    def zero(self) -> None:
        """Forget what was gathered."""
        self._sums, self.num_gathered = {}, 0

    def state_dict(self) -> dict[str, Any]:
        """Optimiser state, and what has been gathered since its last step."""
        return {
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "num_gathered": self.num_gathered,
            "num_updates": self.num_updates,
            "sums": {name: total.clone() for name, total in self._sums.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        if (state["optimizer"] is None) != (self.optimizer is None):
            raise InputError("the saved state and this rule differ in whether the stage has an optimiser")
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.num_gathered, self.num_updates = state["num_gathered"], state["num_updates"]
        self._sums = {name: torch.as_tensor(total).clone() for name, total in state["sums"].items()}
