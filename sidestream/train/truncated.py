"""Truncated back-propagation through time: a clip goes through the stream of a model, with an update every N frames.

Williams and Peng, 1990: here h = k1 = k2 = N, windows that do not overlap.

    frames     0 ... N-1 | N ... 2N-1 | ...        state is carried over |, no gradient is
    answers     -> loss      -> loss               backward and update at |, and at the end of the clip
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from sidestream.errors import InputError
from sidestream.nn.steppable import Steppable
from sidestream.train.config import TrainConfig
from sidestream.train.feedback import give_feedback
from sidestream.train.rules import MakeOptimizer, Metrics, StepContext, Update, check_finite
from sidestream.types import NOTHING


class TruncatedBackprop:
    """``Backprop`` with ``bptt_frames``: the loss of N frames is the mean over the answers that they bring.

    With N of the clip's length or more there is one update, with the gradient of ``Backprop`` under the task "frame".
    Frames that bring no answer (strided layers, or before the first answer of a net that looks ahead) carry the state
    on; N of them make no update, nor do N whose answers have no target (of a frame behind the end of the clip). What a
    net that looks ahead still owes belongs to the last frames. The state is fresh for each clip. Layers work frame by
    frame: a batch norm in train mode normalises by one frame of each clip.

    Raises ``InputError`` for models without a streaming form, for the task "clip" (its one loss, at the end, would
    teach nothing before the last N frames), and for options that do not go with it.
    """

    def __init__(self, context: StepContext) -> None:
        check_options(context.config, context.model)
        give_feedback(context.model, context.config)
        self._context, self._num_frames = context, context.config.bptt_frames or 0
        model: Any = context.model
        self._stream: Steppable = model.streaming()

    def make_optimizers(self, make: MakeOptimizer) -> list[Optimizer]:
        return [make(p for p in self._context.model.parameters() if p.requires_grad)]

    def step(self, clip_BTCHW: Tensor, labels_B: Tensor, update: Update) -> Metrics:
        task, stream, T = self._context.task, self._stream, clip_BTCHW.shape[1]
        state, loss_sum = stream.init_state(clip_BTCHW[:, 0]), 0.0
        made: list[Tensor] = []
        num_judged = 0
        for start in range(0, T, self._num_frames):
            end = min(start + self._num_frames, T)
            answers, state = self._walk(clip_BTCHW[:, start:end], _detached(state), and_finish=end == T)
            first = len(made)
            made += [answer.detach() for answer in answers]
            count = task.num_targets(len(answers), T, first)
            if not count:
                continue
            loss = task.clip_loss(torch.stack(answers, dim=1), clip_BTCHW, labels_B, first=first)
            check_finite(loss)
            self._context.backward(loss)
            update((0,))
            num_judged += count
            loss_sum += float(loss.detach()) * count
        if not made:
            raise InputError(
                f"a clip of {T} frames is too short: the stream of {type(self._context.model).__name__} answers none "
                "of them; give longer clips (num_frames)"
            )
        more = task.train_metrics(torch.stack(made).mean(0), labels_B) if task.measures_training else {}
        return {"loss": torch.tensor(loss_sum / max(1, num_judged)), **more}

    def _walk(self, chunk_BTCHW: Tensor, state: Any, *, and_finish: bool) -> tuple[list[Tensor], Any]:
        answers: list[Tensor] = []
        for frame_BCHW in chunk_BTCHW.unbind(1):
            answer, state = self._stream.step(frame_BCHW, state)
            answers += [] if answer is NOTHING else [answer]
        return [*answers, *(self._stream.finish(state) if and_finish else ())], state


def check_options(config: TrainConfig, model: nn.Module) -> None:
    """Raises ``InputError`` for what truncated back-propagation through time cannot be used with."""
    name, given = type(model).__name__, f"bptt_frames={config.bptt_frames}"
    if not hasattr(model, "streaming"):
        raise InputError(
            f"{given} with {name}, which has no streaming form: it reads whole clips (or single frames, with no time "
            "to go back through); leave bptt_frames away, or take a model that streams, such as cnn_gru"
        )
    if config.task == "clip":
        raise InputError(
            f"{given} with task='clip', whose one loss at the end of the clip teaches nothing before the last frames; "
            "use task='frame', or leave bptt_frames away"
        )
    if config.accumulate > 1:
        raise InputError(f"{given} with accumulate={config.accumulate}; it makes its updates within a batch: give 1")
    if config.precision != "no":
        raise InputError(f"{given} with precision={config.precision!r}; it trains in float32: 'no'")
    if config.feedback == "direct":
        raise InputError(f"{given} with feedback='direct', which crosses no state; use 'own' or 'random'")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise InputError(f"{given} trains in one process, but {torch.distributed.get_world_size()} were started")


def _detached(state: Any) -> Any:
    return pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, state)
