"""Training: one loop for all rules, on labelled clips."""

from sidestream.train.config import TrainConfig
from sidestream.train.evaluate import Evaluation, evaluate
from sidestream.train.fit import TrainResult, fit
from sidestream.train.rules import RULES, StepContext, TrainStep
from sidestream.train.skip_net import SkipNet, with_skips

__all__ = [
    "RULES",
    "Evaluation",
    "SkipNet",
    "StepContext",
    "TrainConfig",
    "TrainResult",
    "TrainStep",
    "evaluate",
    "fit",
    "with_skips",
]
