"""Is a model causal? Found by poisoning: later frames become NaN, and earlier answers must not feel it.

The n-th of N answers over time belongs to the n-th of N equal parts of the clip (a frame each where there are as many
answers as frames). A model is causal when no answer feels a frame after its part. A model with one answer for the
whole clip has no answer before the clip's last frame, so all earlier frames wait for later ones: not causal, unless
even that answer does not feel the last frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sidestream.evals.compare_forms import Forms


@dataclass(frozen=True)
class Causality:
    """What poisoning found."""

    is_causal: bool
    look_ahead_frames: int
    """The most frames after its own that an answer was seen to feel (no more than the clip can show)."""
    num_answers: int
    """Answers over time that were looked at; 1: the model answers for the whole clip only."""
    num_frames: int
    """Of the clip that was poisoned."""


def find_causality(forms: Forms, clip_BTCHW: Tensor, *, max_frames: int = 64) -> Causality:
    """Poison ``clip_BTCHW`` in ``forms``'s answers over time (its clip's answer where it has none).

    A clip of a single frame has nothing later to poison: it is repeated once.
    A net with temporal strides may give one answer only for a short clip, which shows nothing: then the clip is
    repeated until there are two or more, up to ``max_frames``.
    """
    if clip_BTCHW.shape[1] == 1:
        clip_BTCHW = torch.cat([clip_BTCHW, clip_BTCHW], dim=1)
    if forms.answers is None:
        return poison(lambda clip: forms.clip(clip).unsqueeze(1), clip_BTCHW)
    while (found := poison(forms.answers, clip_BTCHW)).num_answers == 1 < clip_BTCHW.shape[1] <= max_frames // 2:
        clip_BTCHW = torch.cat([clip_BTCHW, clip_BTCHW], dim=1)
    return found


@torch.no_grad()
def poison(answers: Callable[[Tensor], Any], clip_BTCHW: Tensor) -> Causality:
    """``answers``: clip_BTCHW -> (B, N, ...). For each frame, it and all later ones become NaN.

    What feels NaN must also feel other pixels there before it counts: a masked weight of 0 times NaN is NaN.
    """
    num_frames, sound = clip_BTCHW.shape[1], answers(clip_BTCHW)
    num_answers = sound.shape[1]
    # The newest frame of each answer's own part; the one answer for a whole clip is the first frame's too.
    own = [(n + 1) * num_frames // num_answers - 1 if num_answers > 1 else 0 for n in range(num_answers)]
    look_ahead = 0
    for first in range(num_frames - 1, own[0], -1):
        if first - own[0] <= look_ahead:  # earlier frames are nearer to all answers
            break
        early = [n for n in range(num_answers) if own[n] < first]
        if felt := _feeling(answers, clip_BTCHW, sound, first, early):
            look_ahead = max(look_ahead, *(first - own[n] for n in felt))
    return Causality(look_ahead == 0, look_ahead, num_answers, num_frames)


def _feeling(
    answers: Callable[[Tensor], Any], clip_BTCHW: Tensor, sound: Tensor, first: int, early: Sequence[int]
) -> list[int]:
    """Which of the answers ``early`` feel the frames from ``first`` on."""
    poisoned = clip_BTCHW.clone()
    poisoned[:, first:] = float("nan")
    found = answers(poisoned)
    suspects = [n for n in early if not torch.equal(found[:, n], sound[:, n])]
    if not suspects:
        return []
    generator = torch.Generator().manual_seed(first)
    poisoned[:, first:] = torch.rand(poisoned[:, first:].shape, generator=generator).to(poisoned) * 4 - 2
    found = answers(poisoned)
    return [n for n in suspects if not torch.equal(found[:, n], sound[:, n])]
