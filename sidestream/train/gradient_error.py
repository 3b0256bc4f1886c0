"""``GradientError``: one gradient of one stage beside the true one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from sidestream.engine.rules.stage_backward import Gradients
from sidestream.engine.rules.training import StageGradient

Pairs = list[tuple[Any, Any]]
"""Of frame and target."""


@dataclass(frozen=True, slots=True)
class GradientError:
    """One gradient of one stage in one tick, all its parameters together, against the true one."""

    stage: int
    tick: int
    input_frame: int
    """At which the product was taken."""
    cotangent_frame: int
    """Whose loss it is about; the true gradient is of this frame."""
    cosine: float
    """Of the two gradients; NaN where one of them is zero."""
    norm: float
    true_norm: float
    error: float
    """Norm of the difference."""
    motion: float
    """Mean absolute difference of the two frames, in the units of the net's input."""
    weight_change: float
    """Norm of the change of the stage's parameters since it went forward on the cotangent's frame."""
    bound: float | None = None
    """At least ``error``, from the products of Jacobians measured for this frame; None where not asked for."""
    motion_bound: float | None = None
    """At least ``bound``: constants of the clip x change of the input frames."""

    @property
    def age_gap(self) -> int:
        return self.input_frame - self.cotangent_frame

    @property
    def norm_ratio(self) -> float:
        """Length of the gradient, of the true one's; NaN where that is zero."""
        return self.norm / self.true_norm if self.true_norm else math.nan

    @property
    def relative_error(self) -> float:
        """Below 1 the gradient points downhill: the cosine is then at least sqrt(1 - relative_error^2)."""
        return self.error / self.true_norm if self.true_norm else math.nan


def error_of(pseudo: StageGradient, true: Gradients, pairs: Pairs, weight_change: float) -> GradientError:
    """``pairs``: the clip, of which both frames are. A parameter that one side has no gradient for counts as zero."""
    ours, theirs = pseudo.gradients, true
    dot = sum(float((ours[n].double() * theirs[n].double()).sum()) for n in ours.keys() & theirs.keys())
    norm = math.sqrt(sum(map(_square, ours.values())))
    true_norm = math.sqrt(sum(map(_square, theirs.values())))
    difference = sum(_square(ours.get(n, 0.0) - theirs.get(n, 0.0)) for n in ours.keys() | theirs.keys())
    newest = len(pairs) - 1  # the last frame is repeated where ages mix
    input_frame, frame = (min(n or 0, newest) for n in (pseudo.input_frame, pseudo.cotangent_frame))
    return GradientError(
        pseudo.stage,
        pseudo.tick,
        input_frame,
        frame,
        cosine=max(-1.0, min(1.0, dot / (norm * true_norm))) if norm and true_norm else math.nan,
        norm=norm,
        true_norm=true_norm,
        error=math.sqrt(difference),
        motion=_motion(pairs[input_frame][0], pairs[frame][0]),
        weight_change=weight_change,
    )


def _motion(newer: Any, older: Any) -> float:
    leaves = zip(pytree.tree_leaves(newer), pytree.tree_leaves(older), strict=True)
    changes = [(a.double() - b.double()).abs() for a, b in leaves if isinstance(a, Tensor)]
    return sum(float(c.sum()) for c in changes) / max(1, sum(c.numel() for c in changes))


def _square(value: Any) -> float:
    return float(value.detach().double().square().sum())
