"""Who works when: the schedules as formulas, and the same counted on the running machine.

A slot is one forward or one backward of one stage on one frame (or micro-batch). A circuit's tick has two of them; a
cycle of GPipe has one. "Idle" is the share of slots, over one clip, in which a stage has no work. K stages, M frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from sidestream.circuit.wire import Circuit
from sidestream.clock import WALL
from sidestream.engine.feed import Feed
from sidestream.engine.rules.training import StageGradient, TrainingRule
from sidestream.engine.tick import Machine


def idle_share(method: str, K: int, M: int) -> float:
    """Over one clip, mean over the stages; by formula."""
    if method in ("backprop", "bptt"):
        return 1 - 1 / K
    if method == "gpipe":
        return (K - 1) / (M + K - 1)
    if method == "1f1b":  # ticks of a forward and a backward; the machine waits for the last gradient
        return 2 * (K - 1) / (M + 2 * (K - 1))
    if method == "sideways":  # what is in flight when the clip ends is dropped
        used = sum(M + max(0, M - 2 * (K - i)) for i in range(1, K + 1))
        return 1 - used / (2 * K * (M + K - 1))
    raise ValueError(method)


def kept_inputs(method: str, K: int, M: int) -> list[int]:
    """Inputs that each stage holds at most, the one at work included; by formula."""
    per_stage: dict[str, Callable[[int], int]] = {
        "backprop": lambda i: 1,
        "bptt": lambda i: M,
        "gpipe": lambda i: M,
        "1f1b": lambda i: min(M, 2 * (K - i) + 1),
        "sideways": lambda i: 1,
    }
    return [per_stage[method](i) for i in range(1, K + 1)]


@dataclass
class Counted:
    """What a run did, slot by slot."""

    num_stages: int
    num_ticks: int = 0
    forward_ticks: list[list[int]] = field(default_factory=list)
    backward_ticks: list[list[int]] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    records: list[StageGradient] = field(default_factory=list)

    @property
    def idle_shares(self) -> list[float]:
        """Per stage."""
        slots = zip(self.forward_ticks, self.backward_ticks, strict=True)
        return [1 - (len(set(f)) + len(set(b))) / (2 * self.num_ticks) for f, b in slots]

    @property
    def idle_share(self) -> float:
        return sum(self.idle_shares) / self.num_stages

    def idle_between(self, first: int, end: int) -> float | None:
        """Over these ticks alone, mean over the stages; None where there are none."""
        if end <= first:
            return None
        used = sum(first <= t < end for ticks in (*self.forward_ticks, *self.backward_ticks) for t in set(ticks))
        return 1 - used / (2 * self.num_stages * (end - first))

    def ticks_to_gradient(self, stage: int) -> int | None:
        """From the tick in which a frame arrives to that in which ``stage`` has its loss's gradient; None: never."""
        waits = {r.tick - r.cotangent_frame for r in self.records if r.stage == stage and r.cotangent_frame is not None}
        return max(waits, default=None)


class KeptInputs:
    """Counts, at every forward, how many inputs of each module are still in memory: by their storages."""

    def __init__(self, modules: Sequence[nn.Module], on_forward: Callable[[int], None] = lambda n: None) -> None:
        self.most = [0] * len(modules)
        self._alive: list[list[StorageWeakRef]] = [[] for _ in modules]
        self._on_forward = on_forward
        self._handles = [m.register_forward_pre_hook(self._hook(n)) for n, m in enumerate(modules)]

    def _hook(self, n: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._on_forward(n)
            new = StorageWeakRef(inputs[0].untyped_storage())
            alive = [ref for ref in self._alive[n] if not ref.expired()]
            self._alive[n] = alive if new in alive else [*alive, new]
            self.most[n] = max(self.most[n], len(self._alive[n]))

        return count

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def counted(
    circuit: Circuit,
    make_rule: Callable[[Callable[[StageGradient], None]], TrainingRule],
    pairs: Iterable[tuple[Tensor, Tensor]],
) -> Counted:
    """Run ``circuit`` tick by tick on one thread, and count. ``make_rule``: given the observer."""
    modules = [stage.module for stage in circuit.stages]
    found = Counted(len(modules), 0, [[] for _ in modules], [[] for _ in modules])
    rule = make_rule(found.records.append)
    silent = rule.num_silent_ticks(circuit)
    feed = Feed(pairs, circuit, prepare=None, clock=WALL, has_targets=True, num_silent_ticks=silent)
    machine = Machine(rule.attach(circuit), rule)
    kept = KeptInputs(modules, lambda n: found.forward_ticks[n].append(machine.cells[n].tick))
    try:
        for _ in _ticks(machine, feed):
            pass
    finally:
        kept.remove()
    for r in found.records:
        found.backward_ticks[r.stage - 1].append(r.tick)
    found.kept = kept.most
    found.num_ticks = 1 + max(t for ticks in (*found.forward_ticks, *found.backward_ticks) for t in ticks)
    return found


def _ticks(machine: Machine, feed: Feed) -> Iterator[None]:
    """As the executor "inline" does it."""
    for leaves, fed in feed:
        machine.feed(leaves, fed)
        for cell in machine.cells:
            machine.fire(cell)
        _collect(machine)
        yield
    machine.end()
    while not machine.is_finished:
        for cell in machine.cells:
            if cell.is_ready:
                machine.fire(cell)
        _collect(machine)
        yield


def _collect(machine: Machine) -> None:
    while machine.can_collect:
        machine.collect(0.0)


def fresh_pairs(frames_TCHW: Tensor, labels_T: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Frame by frame as batches of one, each in memory of its own, which nobody holds but who reads it."""
    for frame, label in zip(frames_TCHW, labels_T, strict=True):
        yield frame[None].clone(), label[None].clone()


def flat_gradients(modules: Sequence[nn.Module], gradients: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """One long vector per stage, zeros where a parameter has no gradient."""
    return [
        torch.cat([(own[name] if name in own else torch.zeros_like(p)).flatten() for name, p in m.named_parameters()])
        for m, own in zip(modules, gradients, strict=True)
    ]
