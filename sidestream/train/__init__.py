"""Training: one loop for all rules, on labelled clips."""

from sidestream.train.config import TrainConfig
from sidestream.train.evaluate import Evaluation, evaluate
from sidestream.train.fit import TrainResult, fit
from sidestream.train.rules import RULES, StepContext, TrainStep

__all__ = [
    "RULES",
    "Evaluation",
    "StepContext",
    "TrainConfig",
    "TrainResult",
    "TrainStep",
    "evaluate",
    "fit",
]
