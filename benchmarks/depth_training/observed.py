"""Idle slots, kept inputs, waiting: counted while each method runs, beside the formulas. No clock is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from gpipe import GPipe
from nets import make, random_frames
from schedules import Counted, KeptInputs, counted, fresh_pairs, idle_share, kept_inputs
from torch import Tensor, nn
from torch.nn import functional as F

from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.wiring import parallel, pipelined
from sidestream.engine.rules.exact import Exact
from sidestream.engine.rules.sideways import Sideways


def observe(method: str, modules: Sequence[nn.Module], frames_TCHW: Tensor, labels_T: Tensor) -> dict[str, Any]:
    """Idle share of every stage, most inputs that it kept, slots or ticks that a frame waits for its gradient."""
    if method in ("backprop", "bptt"):
        return _in_a_row(method, modules, frames_TCHW, labels_T)
    if method == "gpipe":
        return _gpipe(modules, frames_TCHW, labels_T)
    skips = "add" if method == "skip-sideways" else "none"
    stages = stages_of(modules, frames_TCHW[:1], skips=skips)
    circuit = (parallel if skips == "add" else pipelined)(stages)
    if method == "1f1b":
        made: Counted = counted(
            circuit, lambda o: Exact(F.cross_entropy, observe=o), fresh_pairs(frames_TCHW, labels_T)
        )
    else:
        made = counted(circuit, lambda o: Sideways(F.cross_entropy, observe=o), fresh_pairs(frames_TCHW, labels_T))
    stages_ = range(1, len(modules) + 1)
    return {
        "num_slots": 2 * made.num_ticks,
        "idle_shares": made.idle_shares,
        "kept_inputs": made.kept,
        "idle_when_full": made.idle_between(2 * (len(modules) - 1), len(labels_T)),
        "ticks_to_gradient": [made.ticks_to_gradient(i) for i in stages_],
        "slots": sorted(
            (2 * tick + back, n, back)
            for back, per_stage in enumerate((made.forward_ticks, made.backward_ticks))
            for n, ticks in enumerate(per_stage)
            for tick in ticks
        ),
    }


def _gpipe(modules: Sequence[nn.Module], frames_TCHW: Tensor, labels_T: Tensor) -> dict[str, Any]:
    """A frame is a micro-batch; a cycle is a slot."""
    kept, pipe = KeptInputs(modules), GPipe(modules, F.cross_entropy)
    micro, targets = map(list, zip(*fresh_pairs(frames_TCHW, labels_T), strict=True))
    done = pipe.step(micro, targets)
    pipe.close()
    kept.remove()
    idle = [1 - sum(task[1] == n for task in done.tasks) / done.num_cycles for n in range(len(modules))]
    slots = [(cycle, n, int(2 * cycle >= done.num_cycles)) for cycle, n, _ in done.tasks]
    return {"num_slots": done.num_cycles, "idle_shares": idle, "kept_inputs": kept.most, "slots": slots}


def _in_a_row(method: str, modules: Sequence[nn.Module], frames_TCHW: Tensor, labels_T: Tensor) -> dict[str, Any]:
    """Stage after stage, forward and back; a slot is a stage on a frame. "bptt": forward over the clip, then back."""
    slots: list[tuple[int, int, int]] = []

    def count(n: int, back: int) -> None:
        slots.append((len(slots), n, back))  # one stage works at a time

    kept = KeptInputs(modules, lambda n: count(n, 0))
    losses = []
    for x, y in fresh_pairs(frames_TCHW, labels_T):
        for n, module in enumerate(modules):
            x = module(x)
            x.register_hook(lambda gradient, n=n: count(n, 1))  # called when the stage goes back
        loss = F.cross_entropy(x, y)
        if method == "bptt":
            losses.append(loss)
        else:
            loss.backward()
        del loss, x, y
    if losses:
        torch.stack(losses).mean().backward()
    kept.remove()
    idle = [1 - sum(slot[1] == n for slot in slots) / len(slots) for n in range(len(modules))]
    return {"num_slots": len(slots), "idle_shares": idle, "kept_inputs": kept.most, "slots": slots}


METHODS = ("backprop", "bptt", "gpipe", "1f1b", "sideways", "skip-sideways")


def measure(sizes: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    for K, M in sizes:
        for method in METHODS:
            if method == "skip-sideways" and K < 3:
                continue
            found = observe(method, make({"row": K, "width": 4}), *random_frames(M, 16))
            if K * M > 32:  # only for the picture
                del found["slots"]
            idle = found["idle_shares"]
            formula = None if method == "skip-sideways" else idle_share(method, K, M)
            kept = kept_inputs("sideways" if method == "skip-sideways" else method, K, M)
            case = {"method": method, "num_stages": K, "num_frames": M}
            yield {
                "case": case,
                **found,
                "idle_share": sum(idle) / K,
                "idle_share_by_formula": formula,
                "kept_by_formula": kept,
            }
