"""How far each rule's gradients are from autograd's, stage by stage, on real clips.

A clip's gradient is that of the mean loss of its frames. Two comparisons: with that ("clip"), and, since Sideways drops
what is in flight when a clip ends, for each stage with the mean over just those frames whose gradient it took
("same frames"), which leaves only the error that comes from mixing frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from gpipe import GPipe
from nets import jhmdb_clips, make
from schedules import flat_gradients, fresh_pairs
from torch import Tensor, nn
from torch.nn import functional as F

from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.wiring import pipelined
from sidestream.engine import run
from sidestream.engine.rules.exact import Exact
from sidestream.engine.rules.sideways import Sideways
from sidestream.engine.rules.training import StageGradient

RULES = ("backprop, frame by frame", "gpipe", "gpipe, recomputing", "1f1b", "1f1b, recomputing", "sideways")


def autograd(modules: Sequence[nn.Module], frames_TCHW: Tensor, labels_T: Tensor) -> list[Tensor]:
    """One vector per stage."""
    loss = F.cross_entropy(nn.Sequential(*modules)(frames_TCHW), labels_T)
    own = [list(m.parameters()) for m in modules]
    found = iter(torch.autograd.grad(loss, [p for ps in own for p in ps]))
    return [torch.cat([next(found).flatten() for _ in ps]) for ps in own]


def by_rule(
    rule: str, modules: list[nn.Module], frames_TCHW: Tensor, labels_T: Tensor
) -> tuple[list[Tensor], list[list[int]]]:
    """The clip's gradient per stage, and the frames whose losses have a part in it."""
    every = [list(range(len(labels_T)))] * len(modules)
    if rule.startswith("backprop"):
        each = [autograd(modules, x, y) for x, y in fresh_pairs(frames_TCHW, labels_T)]
        return [torch.stack(stage).mean(0) for stage in zip(*each, strict=True)], every
    if rule.startswith("gpipe"):
        for m in modules:
            m.zero_grad()
        pipe = GPipe(modules, F.cross_entropy, recomputes="recomputing" in rule)
        pipe.step(frames_TCHW.split(1), labels_T.split(1))
        pipe.close()
        found = [{name: p.grad for name, p in m.named_parameters() if p.grad is not None} for m in modules]
        return flat_gradients(modules, found), every
    records: list[StageGradient] = []
    options: dict[str, Any] = {"observe": records.append, "update": "clip"}
    if rule.startswith("1f1b"):
        made: Any = Exact(F.cross_entropy, keep="inputs" if "recomputing" in rule else "graph", **options)
    else:
        made = Sideways(F.cross_entropy, **options)
    circuit = pipelined(stages_of(modules, frames_TCHW[:1]))
    for _ in run(circuit, fresh_pairs(frames_TCHW, labels_T), rule=made, executor="inline"):
        pass
    stages = range(1, len(modules) + 1)
    taken = [sorted(int(r.cotangent_frame or 0) for r in records if r.stage == i) for i in stages]
    return flat_gradients(modules, [made.gradients(i) for i in stages]), taken


def compare(found: Tensor, true: Tensor) -> dict[str, float | None]:
    """None where the true gradient is zero (all ReLUs shut)."""
    if not true.norm() > 0:
        return {"relative_error": None, "cosine": None}
    return {
        "relative_error": float((found - true).norm() / true.norm()),
        "cosine": float(F.cosine_similarity(found.double(), true.double(), dim=0)),
    }


def trained(modules: list[nn.Module], clips: Sequence[tuple[str, Tensor, int]], num_steps: int) -> None:
    """Plain SGD by backprop on the clips, so that gradients are not only those of random weights."""
    net = nn.Sequential(*modules)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    for n in range(num_steps):
        _, frames_TCHW, label = clips[n % len(clips)]
        some_TCHW = frames_TCHW[:: max(1, len(frames_TCHW) // 8)].to(next(net.parameters()).dtype)
        optimizer.zero_grad()
        F.cross_entropy(net(some_TCHW), torch.full((len(some_TCHW),), label)).backward()
        optimizer.step()


SETTINGS: tuple[dict[str, Any], ...] = (
    {"splits": [], "steps": ("still", 1, 2), "num_frames": 18},
    {"splits": [2, 4, 6], "steps": ("still", 1, 4), "num_frames": 10},
)
"""Eight stages, and four of two layers each: at every fourth frame, JHMDB's clips (40 frames) fill only those."""


def measure(*, size_px: int = 64, num_clips: int = 4, num_steps: int = 60) -> Iterator[dict[str, Any]]:
    """Sideways on all clips, in float32; the exact ones on the first clip at full frame rate, in both precisions."""
    clips = jhmdb_clips(num_clips, 37, size_px)
    for setting in SETTINGS:
        for dtype, weights in (("float32", "random"), ("float32", "trained"), ("float64", "random")):
            modules = make({"vgg": "vgg8_quarter", "splits": setting["splits"], "dtype": dtype})
            if weights == "trained":
                trained(modules, clips, num_steps)
            for step in setting["steps"]:
                for rule in RULES:
                    is_exact = rule != "sideways"
                    if (is_exact and (step != 1 or weights != "random")) or (not is_exact and dtype != "float32"):
                        continue
                    some = clips[:1] if is_exact else clips
                    errors = [_errors(rule, modules, c, step, setting["num_frames"], dtype) for c in some]
                    case = {"rule": rule, "num_stages": len(modules), "step": step, "dtype": dtype}
                    case |= {"weights": weights, "num_frames": setting["num_frames"], "size_px": size_px}
                    print(case, flush=True)
                    yield {"case": case, "clips": [c[0] for c in some], "per_clip": errors}


def _errors(
    rule: str, modules: list[nn.Module], clip: tuple[str, Tensor, int], step: int | str, num_frames: int, dtype: str
) -> list[dict[str, Any]]:
    """Per stage."""
    frames_TCHW = clip[1].to(getattr(torch, dtype))
    if step == "still":
        frames_TCHW = frames_TCHW[:1].expand(num_frames, -1, -1, -1).contiguous()
    else:
        frames_TCHW = frames_TCHW[:: int(step)][:num_frames]
    if len(frames_TCHW) != num_frames:
        raise ValueError(f"{clip[0]}: {len(frames_TCHW)} frames at step {step}; {num_frames} are needed")
    labels_T = torch.full((num_frames,), clip[2])
    found, taken = by_rule(rule, modules, frames_TCHW, labels_T)
    whole = autograd(modules, frames_TCHW, labels_T)
    errors = []
    for n, frames in enumerate(taken):
        same = autograd(modules, frames_TCHW[frames], labels_T[frames])[n] if rule == "sideways" else whole[n]
        errors.append({"clip": compare(found[n], whole[n]), "same_frames": compare(found[n], same)})
    return errors
