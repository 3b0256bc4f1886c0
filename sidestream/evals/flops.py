"""Floating-point operations, counted while the model runs: of a clip, and of an answer on a stream.

A multiply-add counts as 2. ``torch.utils.flop_counter`` counts convolutions, matrix products and attention, and
nothing else: additions, activations, norms and pooling are left out, as they are in the papers. What it misses on a CPU
is added in ``report/flops.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.nn.steppable import Steppable
from sidestream.report.flops import counting_flops
from sidestream.types import NOTHING


def count_flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of one call of ``work``, without gradients; a multiply-add is 2."""
    with torch.no_grad(), counting_flops() as counter:
        work()
    return int(counter.get_total_flops())


def clip_flops(model: nn.Module, clip_BTCHW: Tensor) -> int:
    """Of one call on a whole clip."""
    return count_flops(lambda: model(clip_BTCHW))


def stream_flops(stream: Steppable, frame_BCHW: Tensor, *, num_warm_up: int = 0) -> int:
    """Per answer, in the steady state: over the ``period_ticks`` frames from one answer to the next.

    ``num_warm_up``: frames before it, so that caches and windows are full; the stream's delay is always added. Per
    frame of the stream it is this divided by ``stream.period_ticks``.
    """
    with torch.no_grad():
        state = _fed(stream, frame_BCHW, stream.init_state(frame_BCHW), num_warm_up + stream.delay_ticks)[1]
        num_answers = 0

        def period() -> None:
            nonlocal num_answers
            num_answers = _fed(stream, frame_BCHW, state, stream.period_ticks)[0]

        flops = count_flops(period)
    assert num_answers == 1, f"{num_answers} answers in a period of {stream.period_ticks} ticks"
    return flops


def num_parameters(model: nn.Module) -> int:
    """Numbers in all parameters, each once."""
    return sum(p.numel() for p in model.parameters())


def _fed(stream: Steppable, frame_BCHW: Tensor, state: Any, num_ticks: int) -> tuple[int, Any]:
    """(answers, state) after the same frame, ``num_ticks`` times."""
    num_answers = 0
    for _ in range(num_ticks):
        answer, state = stream.step(frame_BCHW, state)
        num_answers += answer is not NOTHING
    return num_answers, state
