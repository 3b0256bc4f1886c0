"""What PARTIME's unmasked fill-up does to the weights: three ways to fill, four optimisers; ours equals "masked"."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from nets import make, random_frames
from partime import FILLS, partime
from schedules import fresh_pairs
from torch import Tensor, nn
from torch.nn import functional as F

from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.wiring import pipelined
from sidestream.engine import run
from sidestream.engine.rules.sideways import Sideways

NUM_STAGES = 8
OPTIMIZERS: dict[str, Any] = {
    "SGD": functools.partial(torch.optim.SGD, lr=1e-3),
    "SGD, momentum 0.9, weight decay 1e-2": functools.partial(
        torch.optim.SGD, lr=1e-3, momentum=0.9, weight_decay=1e-2
    ),
    "Adam": functools.partial(torch.optim.Adam, lr=1e-3),
    "AdamW, weight decay 1e-2": functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=1e-2),
}


def weights(modules: list[nn.Module]) -> list[Tensor]:
    return [torch.cat([p.detach().flatten() for p in m.parameters()]).clone() for m in modules]


def relative(found: list[Tensor], true: list[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, true, strict=True)]


def measure(*, num_ticks: int = 40) -> Iterator[dict[str, Any]]:
    """On noise: only the weights are compared, nothing is learnt."""
    start = make({"vgg": "vgg8_quarter", "dtype": "float64"})
    frames_TCHW, labels_T = random_frames(num_ticks, 32, "float64")
    pairs = list(fresh_pairs(frames_TCHW, labels_T))
    filled_at = 2 * (NUM_STAGES - 1)
    for name, optimizers in OPTIMIZERS.items():
        ours = copy.deepcopy(start)
        circuit = pipelined(stages_of(ours, pairs[0][0]))
        rule = Sideways(F.cross_entropy, optimizers=optimizers)
        outputs = run(circuit, pairs, rule=rule, executor="inline")
        first_answers = len(pairs) - (
            NUM_STAGES - 1
        )  # ticks with a frame; then the stream drains, which PARTIME has not
        at: dict[str, list[list[Tensor]]] = {}
        for fill in FILLS:
            modules = copy.deepcopy(start)
            seen = at[fill] = []
            partime(
                modules, pairs, F.cross_entropy, optimizers, fill, lambda _, m=modules, s=seen: s.append(weights(m))
            )
        for _ in range(first_answers):
            next(outputs)
        same = relative(weights(ours), at["masked"][-1])
        outputs.close()
        moved = relative(at["masked"][-1], weights(start))
        for fill in FILLS:
            yield {
                "case": {"optimizer": name, "fill": fill, "num_stages": NUM_STAGES, "num_ticks": num_ticks},
                "ours_from_masked": max(same),
                "moved_before_first_gradient": relative(at[fill][filled_at - 1], weights(start)),
                "from_masked_when_filled": relative(at[fill][filled_at], at["masked"][filled_at]),
                "from_masked_at_end": relative(at[fill][-1], at["masked"][-1]),
                "masked_moved_at_end": moved,
            }
