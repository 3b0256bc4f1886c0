"""``TrainConfig``: everything that decides a run, saved with it as ``config.json``."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from sidestream.errors import InputError

CHOICES = {
    "task": ("clip", "frame"),
    "schedule": ("cosine", "constant"),
    "precision": ("no", "bf16", "fp16"),
    "device": ("auto", "cpu"),
}


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How to train. Rates and counts are those of one update; ``batch_size`` is per process.

    Raises ``InputError`` for a value that makes no sense.
    """

    epochs: int = 20
    batch_size: int = 16
    rule: str = "backprop"
    """Who computes the gradients: a name in ``train.rules.RULES``."""
    task: str = "clip"
    """"clip": the loss of the clip's logits; "frame": of every frame's (``model.answers``), each with the clip's
    label, and their mean is what is evaluated."""
    optimizer: str = "sgd"
    """Any class of torch.optim by name, in any case: "sgd" (with Nesterov's momentum), "adamw", "rmsprop" ..."""
    lr: float = 0.01
    weight_decay: float = 1e-4
    momentum: float = 0.9
    """For optimisers that take it (SGD, RMSprop)."""
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments for the optimiser, plain numbers."""
    schedule: str = "cosine"
    warmup_epochs: float = 1.0
    clip_norm: float | None = None
    """Longest gradient, all parameters of an optimiser together."""
    label_smoothing: float = 0.0
    accumulate: int = 1
    """Batches whose gradients are averaged for one update."""
    seed: int = 0
    precision: str = "no"
    device: str = "auto"
    num_workers: int = 2
    patience: int | None = None
    """Stop early after so many epochs without a better test accuracy."""
    evaluate_every: int = 1
    """Epochs; the last one is always evaluated."""
    checkpoint_minutes: float = 5.0
    """A checkpoint is written when so much time has passed, after every epoch, and at the end."""
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        for name in ("epochs", "batch_size", "accumulate", "evaluate_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give 1 or more")
        for name in ("weight_decay", "momentum", "warmup_epochs", "seed", "num_workers", "checkpoint_minutes"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"{name} is {getattr(self, name)}; give 0 or more")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr is {self.lr}; give a number above 0")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing is {self.label_smoothing}; give 0 or more, below 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(f"clip_norm is {self.clip_norm}; give a number above 0, or None")
        if self.patience is not None and self.patience < 1:
            raise InputError(f"patience is {self.patience}; give 1 or more, or None")

    def replace(self, **changes: Any) -> TrainConfig:
        return dataclasses.replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Raises ``InputError`` for a name that there is not."""
        known = {each.name for each in dataclasses.fields(cls)}
        if unknown := set(values) - known:
            raise InputError(f"unknown training options {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return cls(**values)
