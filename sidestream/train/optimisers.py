"""Optimisers by name: any class of ``torch.optim``, made from the run's configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sidestream.errors import InputError
from sidestream.train.config import TrainConfig

NOT_BY_STEP = {"lbfgs", "sparseadam"}
"""Need a closure, or sparse gradients."""


def optimizer_class(name: str) -> type[Optimizer]:
    """The class of ``torch.optim`` with that name, in any case. Raises ``InputError`` where there is none."""
    classes = {key.lower(): value for key, value in vars(torch.optim).items() if _is_optimizer(value)}
    found = classes.get(name.lower())
    if found is None or name.lower() in NOT_BY_STEP:
        names = ", ".join(sorted(set(classes) - NOT_BY_STEP))
        raise InputError(f"there is no optimizer {name!r} that can be used here; there are {names}")
    return found


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> Optimizer:
    """Biases and the scales of norms (parameters with one axis or none) have no weight decay.

    Raises ``InputError`` for options that the optimiser does not take, or without a parameter to train.
    """
    kind = optimizer_class(config.optimizer)
    takes = inspect.signature(kind).parameters
    options: dict[str, Any] = {"lr": config.lr}
    if "momentum" in takes:
        options["momentum"] = config.momentum
    if "nesterov" in takes and config.momentum > 0:
        options["nesterov"] = True
    options |= config.optimizer_options
    groups = _decay_groups(list(parameters), config.weight_decay)
    if not groups:
        raise InputError("there is no parameter to train; set requires_grad on those that are to be trained")
    try:
        return kind(groups, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"the optimizer {config.optimizer!r} does not take {options}: {error}") from error


def _decay_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    decayed = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
