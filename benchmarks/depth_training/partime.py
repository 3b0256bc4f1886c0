"""PARTIME's tick, restated: what it does to the weights while the pipeline fills, with and without masks.

Meloni et al., "PARTIME", 2022 (sailab-code/partime): every stage steps its own optimiser in every tick; forward is
before backward; a stage's cotangent is what the next stage sent in the tick before; the target waits K - 1 ticks. While
the pipeline fills:

    "masked"      a stage with nothing at its input does nothing, one without a cotangent makes no step: our rule
    "zero steps"  the same, but every stage steps in every tick, with a gradient of zero where it has none
    "published"   as their code: input and gradient buffers begin as zeros, so the last stage takes losses on what the
                  stages make of zeros, and sends those back (the targets of these ticks are uninitialised memory
                  there, the first target here)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sidestream.engine.rules.loss_stage import Loss
from sidestream.engine.rules.trainer import OptimizerFactory

FILLS = ("masked", "zero steps", "published")


def partime(
    modules: Sequence[nn.Module],
    pairs: Sequence[tuple[Tensor, Tensor]],
    loss: Loss,
    optimizers: OptimizerFactory,
    fill: str,
    after_tick: Callable[[int], None] = lambda tick: None,
) -> None:
    """Train ``modules`` on a stream, one tick per pair."""
    K = len(modules)
    steppers = [optimizers(m.parameters()) for m in modules]
    held: list[Tensor | None] = [None] * K
    if fill == "published":
        with torch.no_grad():
            shapes = [pairs[0][0]]
            for m in modules[:-1]:
                shapes.append(m(shapes[-1]))
            held = [torch.zeros_like(s) for s in shapes]
    sent: list[Tensor | None] = [torch.zeros_like(h) if h is not None else None for h in held[1:]] + [None]
    for tick, (frame, _) in enumerate(pairs):
        held[0] = frame
        inputs = [None if h is None else h.detach().requires_grad_(n > 0) for n, h in enumerate(held)]
        outputs = [None if x is None else m(x) for m, x in zip(modules, inputs, strict=True)]
        replies: list[Tensor | None] = [None] * K
        for n, (m, x, out) in enumerate(zip(modules, inputs, outputs, strict=True)):
            m.zero_grad()
            cotangent = sent[n]
            if n == K - 1 and out is not None:
                loss(out, pairs[max(0, tick - (K - 1))][1]).backward()
            elif out is not None and cotangent is not None:
                torch.autograd.backward(out, cotangent)
            elif fill == "masked":
                continue
            else:
                for p in m.parameters():
                    p.grad = torch.zeros_like(p)
            steppers[n].step()
            replies[n] = None if x is None else x.grad
        sent = [*replies[1:], None]
        held[1:] = [None if out is None else out.detach() for out in outputs[:-1]]
        after_tick(tick)
