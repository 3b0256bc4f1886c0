"""Fixed random matrices over which errors go back: drawn from a seed and a name, so that nobody has to store them.

Lillicrap et al., "Random synaptic feedback weights support error backpropagation for deep learning", Nature
Communications 2016, and Nøkland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks", NeurIPS 2016.
By default a matrix is uniform in +-1 / sqrt(n), n being the number of units whose errors it adds up in feedback
alignment, and the number of units that it feeds in direct feedback alignment (where that is what Nøkland's code does).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sidestream.errors import InputError

DISTRIBUTIONS = ("uniform", "normal")
MOST_NUMBERS = 2**29
"""Of one dense matrix of direct feedback: 2 GiB in float32."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How feedback weights are drawn.

    ``distribution``: "uniform" in +-``scale``, or "normal" with the standard deviation ``scale``. ``scale``: None is
    1 / sqrt(n), see above. Raises ``InputError`` for others.
    """

    seed: int = 0
    distribution: str = "uniform"
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.distribution not in DISTRIBUTIONS:
            raise InputError(f"distribution={self.distribution!r}; expected one of {', '.join(DISTRIBUTIONS)}")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise InputError(f"scale={self.scale}; expected a number above 0, or None for 1 / sqrt(n)")

    def __call__(self, name: str, shape: Sequence[int], num_units: int, like: Tensor) -> Tensor:
        """The weights called ``name``: the same for the same seed, on every device and in every floating type."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        chance = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
        scale = 1 / math.sqrt(num_units) if self.scale is None else self.scale
        with torch.inference_mode(False):
            made = torch.empty(tuple(shape), dtype=torch.float32)
            if self.distribution == "uniform":
                made.uniform_(-scale, scale, generator=chance)
            else:
                made.normal_(0, scale, generator=chance)
            return made.to(device=like.device, dtype=like.dtype)


@dataclass(slots=True)
class ErrorFeedback:
    """What direct feedback alignment sends to the layers: B e for each, B dense and fixed, e the error of the answer.

    The first axis of outputs and errors is the batch. A layer's B, (numbers in its output, numbers in the error) per
    item of the batch, is drawn when it is first asked for.
    """

    draw: Draw
    _drawn: dict[str, Tensor] = field(default_factory=dict)

    def cotangent(self, name: str, output: Tensor, error: Tensor) -> Tensor:
        """B e in the shape of ``output``. Raises ``InputError`` for shapes that do not go together."""
        if output.dim() < 2 or error.dim() < 2 or len(output) != len(error):
            raise InputError(
                f"the output of {name} is of shape {tuple(output.shape)} and the error of the answer of shape "
                f"{tuple(error.shape)}; direct feedback takes both with the batch as their first axis, of one length"
            )
        weights = self.weights(name, output, error)
        return (error.flatten(1) @ weights.to(error.dtype).T).to(output.dtype).view(output.shape)

    def weights(self, name: str, output: Tensor, error: Tensor) -> Tensor:
        """B of the layer ``name``. Raises ``InputError`` where it would be too large (``check_dense``), or where an
        earlier output or error was of another size."""
        shape = (output[0].numel(), error[0].numel())
        if name not in self._drawn:
            check_dense(f"the output of {name}", *shape)
            self._drawn[name] = self.draw(name, shape, shape[0], output)
        drawn = self._drawn[name]
        if drawn.shape != shape:
            raise InputError(
                f"the output of {name} and the error are {shape[0]} and {shape[1]} numbers per item; the feedback "
                f"weights were drawn for {drawn.shape[0]} and {drawn.shape[1]}: train on frames of one size"
            )
        return drawn


def check_dense(what: str, num_outputs: int, num_errors: int) -> None:
    """Raises ``InputError`` for a dense matrix of more than ``MOST_NUMBERS``: answers that are pictures or maps."""
    if (count := num_outputs * num_errors) > MOST_NUMBERS:
        raise InputError(
            f"direct feedback from an answer of {num_errors} numbers to {what}, {num_outputs} numbers, takes a dense "
            f"matrix of {count / 1e9:.1f} billion ({4 * count / 2**30:.0f} GiB in float32; at most {MOST_NUMBERS}): it "
            "is for nets that answer with logits; use feedback='random', smaller frames, or task='clip' or 'frame'"
        )
