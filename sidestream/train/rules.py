"""``TrainStep``: what a training rule is to the loop; ``RULES``: the rules by name. Here: plain backpropagation.

The others, "exact" and "sideways", are in ``train.depth_parallel``.

A rule computes gradients; the loop owns the schedule, the logs and the checkpoints, in which the optimisers' states
are. A rule asks for one optimiser for each group of parameters that is updated on its own: one for plain backprop,
one per stage for rules on a circuit. While it works through a batch it calls ``update(numbers)`` whenever the
gradients in ``.grad`` of these optimisers' parameters are to be checked, clipped, applied and cleared: once per
batch, or in every tick. Rules whose stages step their own optimisers need not call it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from sidestream.errors import InputError
from sidestream.train.config import TrainConfig
from sidestream.train.feedback import direct_feedback, give_feedback
from sidestream.train.skip_net import SkipNet
from sidestream.train.tasks import Task, make_task

Update = Callable[[Sequence[int]], None]
"""Apply and clear the gradients of the optimisers with these numbers."""
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
"""Makes an optimiser as the configuration wants it."""
Metrics = dict[str, Tensor]
"""Detached scalars, means over the batch; "loss" is one of them, and is checked to be finite."""


class TrainStep(Protocol):
    """One rule on one model. From batch to batch it holds nothing but its optimisers' states and the weights, and what
    is in its ``state_dict()`` where it has one (plain values and tensors, with ``load_state_dict(state)``)."""

    def make_optimizers(self, make: MakeOptimizer) -> list[Optimizer]:
        """One optimiser for each group of parameters that is updated on its own. Called once, before the first step."""
        ...

    def step(self, clip_BTCHW: Tensor, labels_B: Tensor, update: Update) -> Metrics:
        """Work through one batch: forward, backward, and ``update`` when gradients are ready. ``labels_B``: what the
        task takes from a batch (``Task.labels_of``): classes (B,), keypoints (B, T, P, 3).

        It must not call ``update`` with a loss that is NaN or infinite (``check_finite`` raises for it).
        """
        ...


@dataclass(frozen=True, slots=True)
class StepContext:
    """What a rule is given when it is made."""

    model: nn.Module
    """The bare model (to be cut, for example)."""
    net: nn.Module
    """``Answering`` on the model, prepared by accelerate: logits (B, T', N), under autocast, across processes."""
    config: TrainConfig
    backward: Callable[[Tensor], Any]
    """Use this instead of ``loss.backward()``: it scales for fp16."""
    example_BTCHW: Tensor | None = None
    """A whole batch of the clips that will come, on the device of the model."""
    task: Task = None  # type: ignore[assignment]
    """Where the loss comes from; by default made from ``config``."""

    def __post_init__(self) -> None:
        if self.task is None:
            object.__setattr__(self, "task", make_task(self.config))


class Backprop:
    """Forward over the whole clip, one backward, one update: for recurrent models this is full BPTT."""

    def __init__(self, context: StepContext) -> None:
        self._context, self._task = context, context.task
        give_feedback(context.model, context.config)
        frame_BCHW = None if context.example_BTCHW is None else context.example_BTCHW[:, 0]
        self._around_forward = direct_feedback(context.model, context.config, frame_BCHW)
        if isinstance(context.model, SkipNet):
            self._task.align(context.model.circuit())

    def make_optimizers(self, make: MakeOptimizer) -> list[Optimizer]:
        return [make(p for p in self._context.model.parameters() if p.requires_grad)]

    def step(self, clip_BTCHW: Tensor, labels_B: Tensor, update: Update) -> Metrics:
        with self._around_forward():
            answers = self._context.net(clip_BTCHW)
        loss = self._task.clip_loss(answers, clip_BTCHW, labels_B)
        check_finite(loss)
        self._context.backward(loss)
        update((0,))
        more = self._task.train_metrics(answers.detach().mean(1), labels_B) if self._task.measures_training else {}
        return {"loss": loss.detach(), **more}


def _backprop(context: StepContext) -> TrainStep:
    from sidestream.train.truncated import TruncatedBackprop

    return Backprop(context) if context.config.bptt_frames is None else TruncatedBackprop(context)


def _unrolled(context: StepContext) -> TrainStep:
    from sidestream.train.predictive import Predictive

    return Predictive(context)


def _exact(context: StepContext) -> TrainStep:
    from sidestream.train.depth_parallel import DepthParallel

    return DepthParallel(context, "exact")


def _sideways(context: StepContext) -> TrainStep:
    from sidestream.train.depth_parallel import DepthParallel

    return DepthParallel(context, "sideways")


RULES: dict[str, Callable[[StepContext], TrainStep]] = {
    "backprop": _backprop,
    "exact": _exact,
    "sideways": _sideways,
    "unrolled": _unrolled,
}
"""A rule joins by a line here."""


def judged(rule: TrainStep, net: nn.Module, task: Task) -> tuple[nn.Module, Task]:
    """What evaluations look at: ``net`` and ``task``, or what the rule says its net will run as."""
    return rule.judged(net, task) if hasattr(rule, "judged") else (net, task)


def rule_by_name(name: str) -> Callable[[StepContext], TrainStep]:
    """Raises ``InputError`` for a rule that there is not."""
    if name not in RULES:
        raise InputError(f"there is no training rule {name!r}; there are: {', '.join(RULES)}")
    return RULES[name]


def check_finite(loss: Tensor) -> None:
    """Raises ``NotFinite`` for a loss that is NaN or infinite."""
    if not loss.isfinite().all():
        raise NotFinite(f"the loss is {float(loss.detach().flatten()[0])}")


class NotFinite(ArithmeticError):
    """A loss or gradient that is NaN or infinite; the loop turns it into a ``TrainError`` that says where."""
