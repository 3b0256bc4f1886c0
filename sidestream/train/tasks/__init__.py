"""Tasks: what a net's answers are compared with, by which loss, and how well it did. A task joins by a line here."""

from __future__ import annotations

from sidestream.errors import InputError
from sidestream.train.config import TrainConfig
from sidestream.train.tasks.classes import ClassTask
from sidestream.train.tasks.drawing import DrawingTask
from sidestream.train.tasks.keypoints import KeypointTask
from sidestream.train.tasks.task import IGNORED, Panel, Scores, Task
from sidestream.types import InputSpec

__all__ = ["IGNORED", "ClassTask", "DrawingTask", "KeypointTask", "Panel", "Scores", "Task", "make_task"]


def make_task(config: TrainConfig, spec: InputSpec | None = None) -> Task:
    """The task that ``config`` names. ``spec``: how the clips were normalised, for metrics in pixels.

    Raises ``InputError`` for options that do not go with it.
    """
    if config.task in ("clip", "frame"):
        return ClassTask(config.label_smoothing)
    if config.label_smoothing:
        raise InputError(f"label_smoothing={config.label_smoothing} with the task {config.task!r}; it is for classes")
    if config.task == "keypoints":
        return KeypointTask(target=config.target, spec=spec)
    horizon = config.horizon if config.task == "future" else None
    return DrawingTask(horizon=horizon, target=config.target, spec=spec)
