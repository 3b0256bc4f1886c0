"""What a task asks of a model: an answer per clip or per frame, from clip models and frame models alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidestream.errors import InputError, SidestreamError
from sidestream.models import info_of


class Answering(nn.Module):
    """``clip_BTCHW`` -> logits (B, T', N): T' = 1 where the task is the clip, one per answer where it is the frame.
    For the tasks that want maps: (B, T', C, H, W).

    A frame model (its layout is "BCHW") is put on every frame, and the clip's logits are the mean of its frames'.
    """

    def __init__(self, model: nn.Module, task: str = "clip") -> None:
        super().__init__()
        self.model, self.task = model, task
        self.train(model.training)
        info = info_of(model)
        self.reads_frames = info is not None and info.input_spec.layout == "BCHW"
        if task != "clip" and not self.reads_frames and not hasattr(model, "answers"):
            raise InputError(
                f"{type(model).__name__} has no answers for single frames (no method answers); use the task 'clip'"
            )

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        if self.reads_frames:
            logits_BTN = self.model(clip_BTCHW.flatten(0, 1)).unflatten(0, clip_BTCHW.shape[:2])
            return logits_BTN if self.task != "clip" else logits_BTN.mean(1, keepdim=True)
        if self.task != "clip":
            return self.model.answers(clip_BTCHW)  # type: ignore[operator]
        return self.model(clip_BTCHW).unsqueeze(1)


def cross_entropy(logits_BTN: Tensor, labels_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean over clips and answers; every answer of a clip has the clip's label. In float32 at least."""
    labels_BT = labels_B.unsqueeze(1).expand(logits_BTN.shape[:2])
    logits = logits_BTN if logits_BTN.dtype == torch.float64 else logits_BTN.float()
    return F.cross_entropy(logits.flatten(0, 1), labels_BT.flatten(), label_smoothing=label_smoothing)


def check_model(net: Answering, clip_BTCHW: Tensor, check_answers: Callable[[str, Any], None]) -> None:
    """Raises ``InputError`` unless the model takes this clip; ``check_answers(name, answers)`` looks at its answers.

    In eval mode and without a gradient, so that nothing in the model changes.
    """
    was_training = net.training
    name, shape = type(net.model).__name__, tuple(clip_BTCHW.shape)
    try:
        with torch.no_grad():
            answers: Any = net.eval()(clip_BTCHW)
    except SidestreamError as error:
        raise InputError(f"{name} does not take clips of shape {shape} (B, T, C, H, W): {error}") from error
    except Exception as error:  # every model fails in its own way
        reason = next(iter(str(error).strip().splitlines()), "")[:200]
        raise InputError(
            f"{name} does not take clips of shape {shape} (B, T, C, H, W): {type(error).__name__}: {reason}; "
            "give the number of frames and the size that the model wants"
        ) from error
    finally:
        net.train(was_training)
    check_answers(name, answers)
