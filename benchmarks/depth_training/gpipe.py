"""GPipe in one process, as a baseline: all forwards of the micro-batches, then all backwards.

Huang et al., 2019, in the clock cycles of torchgpipe (Kim et al., 2020): in cycle k stage j works on micro-batch
k - j; the backward cycles run the same table from its end. Each task of a cycle may run in a thread of its own. (The
library's rule ``Exact`` runs the other order, one forward and one backward per tick.)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sidestream.engine.rules.loss_stage import Loss


@dataclass
class GPipeRun:
    loss: float = 0.0
    num_cycles: int = 0
    tasks: list[tuple[int, int, int]] = field(default_factory=list)
    """(cycle, stage from 0, micro-batch), forward and backward."""
    busy_seconds: list[float] = field(default_factory=list)


def cycles(num_stages: int, num_micro: int) -> list[list[tuple[int, int]]]:
    """Per cycle the tasks (stage, micro-batch), both from 0."""
    return [
        [(j, k - j) for j in range(num_stages) if 0 <= k - j < num_micro] for k in range(num_micro + num_stages - 1)
    ]


class GPipe:
    """``step(micro-batches, targets)`` adds the gradient of the mean loss to ``.grad``."""

    def __init__(
        self, stages: Sequence[nn.Module], loss: Loss, *, recomputes: bool = False, num_threads: int = 1
    ) -> None:
        self.stages, self.loss, self.recomputes = list(stages), loss, recomputes
        self.pool = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,))

    def step(self, micro: Sequence[Tensor], targets: Sequence[Tensor]) -> GPipeRun:
        K, M = len(self.stages), len(micro)
        self.run = GPipeRun(busy_seconds=[0.0] * K)
        self.targets, self.num_micro = targets, M
        self.inputs: list[list[Tensor | None]] = [list(micro), *([None] * M for _ in range(K))]
        self.outputs: list[list[Tensor | None]] = [[None] * M for _ in range(K)]
        self.cotangents: list[list[Tensor | None]] = [[None] * M for _ in range(K)]
        self.losses: list[Tensor] = []
        table = cycles(K, M)
        for tasks in table:
            self._cycle(self._forward, tasks)
        for tasks in reversed(table):
            self._cycle(self._backward, tasks)
        self.run.loss = float(torch.stack(self.losses).mean())
        return self.run

    def _cycle(self, work: object, tasks: list[tuple[int, int]]) -> None:
        def one(task: tuple[int, int]) -> None:
            started = time.perf_counter()
            work(*task)  # type: ignore[operator]
            self.run.busy_seconds[task[0]] += time.perf_counter() - started

        list(self.pool.map(one, tasks))
        self.run.tasks += [(self.run.num_cycles, *task) for task in tasks]
        self.run.num_cycles += 1

    def _value(self, j: int, given: Tensor, m: int) -> Tensor:
        out = self.stages[j](given)
        return self.loss(out, self.targets[m]) / self.num_micro if j == len(self.stages) - 1 else out

    def _forward(self, j: int, m: int) -> None:
        given = self.inputs[j][m]
        assert given is not None
        self.inputs[j][m] = given = given.detach().requires_grad_(j > 0)
        with torch.set_grad_enabled(not self.recomputes):
            out = self._value(j, given, m)
        if j + 1 < len(self.stages):
            self.inputs[j + 1][m] = out.detach()
        else:
            self.losses.append(out.detach() * self.num_micro)
        self.outputs[j][m] = None if self.recomputes else out

    def _backward(self, j: int, m: int) -> None:
        given, out = self.inputs[j][m], self.outputs[j][m]
        assert given is not None
        if out is None:
            out = self._value(j, given, m)
        torch.autograd.backward(out, self.cotangents[j][m])
        if j > 0:
            self.cotangents[j - 1][m] = given.grad
        self.inputs[j][m] = self.outputs[j][m] = self.cotangents[j][m] = None

    def close(self) -> None:
        self.pool.shutdown()
