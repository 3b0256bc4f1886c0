"""Random circuits: stages that mix whatever any earlier stage made, with and without state."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sidestream.circuit.build_stages import stage_of
from sidestream.circuit.stage import Link, Stage, Stages, State, Values


def random_stages(
    seed: int, num_stages: int, *, num_sources: int = 1, is_stateful: bool = False, skip_chance: float = 0.4
) -> Stages:
    """K stages of tanh(W x + ...) on vectors of 5 float64; stage j reads a random set of what came before it."""
    draw = random.Random(seed)
    links: list[Link] = []
    outputs: list[tuple[int, int]] = [(0, n) for n in range(num_sources)]
    stages: list[Stage] = []
    for number in range(1, num_stages + 1):
        last = [(s, n) for s, n in outputs if s == number - 1]
        skipped = [o for o in outputs if o not in last and draw.random() < skip_chance]
        read = last[: draw.randint(1, len(last))] + skipped
        num_outputs = draw.randint(1, 3)
        has_state = is_stateful and draw.random() < 0.5
        stages.append(mixing_stage(f"s{number}", seed * 100 + number, len(read), num_outputs, has_state))
        links += [Link(s, n, number, k) for k, (s, n) in enumerate(read)]
        outputs += [(number, n) for n in range(num_outputs)]
    answered = [(num_stages, 0)] + [o for o in outputs if o[0] not in (0, num_stages) and draw.random() < 0.2]
    links += [Link(s, n, num_stages + 1, k) for k, (s, n) in enumerate(answered)]
    one_input = torch.zeros(5)
    in_spec = pytree.tree_structure(((one_input,) * num_sources, {}))
    return Stages(tuple(stages), tuple(links), in_spec, pytree.tree_structure((0,) * len(answered)))


def mixing_stage(name: str, seed: int, num_inputs: int, num_outputs: int, has_state: bool) -> Stage:
    weights = torch.randn(num_outputs, num_inputs + 1, 5, 5, generator=torch.Generator().manual_seed(seed)).double()

    def step(inputs: Values, state: State) -> tuple[Values, State]:
        carried = state if has_state else torch.zeros(5, dtype=torch.float64)
        mixed = [sum(w @ x for w, x in zip(ws, (*inputs, carried), strict=True)) for ws in weights]
        return tuple(torch.tanh(m) for m in mixed), (0.5 * carried + mixed[0].tanh() if has_state else None)

    init = (lambda: torch.zeros(5, dtype=torch.float64)) if has_state else None
    return Stage(name, step, num_inputs, num_outputs, init_state=init, cost_seconds=1e-3 * (seed % 7 + 1))


def random_frames(seed: int, num_frames: int, *, num_sources: int = 1) -> list[Tensor | tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(num_frames, num_sources, 5, generator=generator, dtype=torch.float64)
    return [f[0] if num_sources == 1 else tuple(f) for f in frames]


class Mixing(nn.Module):
    """tanh(W x + ...) of several inputs, several outputs, on batches of vectors of 5 float64."""

    def __init__(self, seed: int, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(num_outputs, num_inputs, 5, 5, generator=generator, dtype=torch.float64)
        self.weights = nn.Parameter(weights / num_inputs**0.5)
        self.bias = nn.Parameter(0.1 * torch.randn(num_outputs, 5, generator=generator, dtype=torch.float64))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        mixed = [sum(x @ w for x, w in zip(inputs, ws, strict=True)) for ws in self.weights]
        return tuple(torch.tanh(m + b) for m, b in zip(mixed, self.bias, strict=True))


def random_modules(seed: int, num_stages: int, *, num_sources: int = 1) -> Stages:
    """``random_stages`` with parameters: the same links, each stage a ``Mixing`` module, inputs of shape (B, 5)."""
    drawn = random_stages(seed, num_stages, num_sources=num_sources)
    blank = torch.zeros(2, 5, dtype=torch.float64)
    stages = [
        stage_of(Mixing(seed * 100 + n, s.num_inputs, s.num_outputs), (blank,) * s.num_inputs, name=s.name)
        for n, s in enumerate(drawn, start=1)
    ]
    return drawn.with_stages(tuple(stages))


def random_pairs(seed: int, num_frames: int, *, num_sources: int = 1) -> list[tuple[Any, Tensor]]:
    """Batches of two streams, with a target each."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(num_frames, num_sources + 1, 2, 5, generator=generator, dtype=torch.float64)
    return [(f[0] if num_sources == 1 else tuple(f[:-1]), f[-1]) for f in frames]
