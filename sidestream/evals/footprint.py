"""Peak memory of one model at work, measured in a fresh process: ``python -m sidestream.evals.footprint i3d train``.

On a processor: the most memory that the process held (resident) after the model was made, less what it held before
its first call. So parameters are not in it (they are counted apart); gradients, activations and scratch space are.
The process is started with settings under which freed tensors go back to the system at once (one malloc arena, blocks
of 64 KiB and more by mmap), and a fixed number of threads, since each thread brings scratch space of its own. On a
GPU: ``torch.cuda.max_memory_allocated`` less what was allocated before.

What is done to the model: "clip", one call on a whole clip without gradients; "stream", as many frames one at a time
(and what the stream looks ahead besides) without gradients; "train", one training step on a clip: forward, cross
entropy, backward, plain SGD (no state of an optimiser), batch 1.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from sidestream.errors import InputError, ModelError, StageError
from sidestream.report.measure import peak_rss_bytes, proc_kib

Work = Literal["clip", "stream", "train"]

_ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Case:
    """What is measured."""

    model: str
    """A name for ``create_model``, or ``module:function``, where the function makes a model."""
    work: Work
    num_frames: int
    size_px: int = 112
    answer_every: int = 8
    """Of the sliding window, for "stream" with a model without step form."""
    num_classes: int = 21
    num_threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class Footprint:
    """What was found, in bytes."""

    peak_bytes: int
    """Beyond what was held before: activations, scratch space, and for "train" the gradients."""
    parameter_bytes: int
    """Of parameters and buffers, which are not in ``peak_bytes``."""
    is_exact: bool
    """False where the system cannot restart its peak counter, so that a peak while the model was made may hide it."""


def measure_footprint(case: Case, *, timeout_seconds: float = 600.0) -> Footprint:
    """Run ``case`` in a fresh process. Raises ``StageError`` with its last words when it fails or takes too long."""
    options = [f"--{name}={value}" for name, value in asdict(case).items() if name not in ("model", "work")]
    command = [sys.executable, "-m", "sidestream.evals.footprint", case.model, case.work, *options]
    threads = {name: str(case.num_threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            env={**os.environ, **_ALLOCATOR, **threads, **paths},
        )
    except subprocess.TimeoutExpired as error:
        raise StageError(f"{case}: not done after {timeout_seconds:.0f} s") from error
    if done.returncode != 0:
        last = next(iter(reversed(done.stderr.strip().splitlines())), f"exit status {done.returncode}")
        raise StageError(f"{case.model}, {case.work}, {case.num_frames} frames: {last[:300]}")
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


def measure_here(case: Case) -> Footprint:
    """``measure_footprint`` in this process; the first call of the model must not have been before."""
    torch.set_num_threads(case.num_threads)
    torch.manual_seed(0)
    model = _made(case).to(case.device)
    held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    work = _work(model, case)
    _load_kernels(case.device)
    gc.collect()
    if case.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(case.device)
        before = torch.cuda.memory_allocated(case.device)
        work()
        torch.cuda.synchronize(case.device)
        return Footprint(torch.cuda.max_memory_allocated(case.device) - before, held, True)
    is_exact = _restart_peak()
    before = _rss_bytes()
    work()
    return Footprint(max(0, peak_rss_bytes() - before), held, is_exact)


def _made(case: Case) -> nn.Module:
    module, colon, function = case.model.partition(":")
    if colon:
        return getattr(importlib.import_module(module), function)()
    from sidestream.models import create_model

    return create_model(case.model, num_classes=case.num_classes)


def _work(model: nn.Module, case: Case) -> Callable[[], Any]:
    from sidestream.evals.compare_forms import forms_of

    forms = forms_of(model, num_frames=case.num_frames, answer_every=case.answer_every)
    shape = (1, case.num_frames, 3, case.size_px, case.size_px)
    clip_BTCHW = torch.rand(shape, device=case.device) * 2 - 1
    if case.work == "train":
        forms.clip.train()
        return lambda: _train(forms.clip, clip_BTCHW)
    if case.work == "clip":
        return lambda: _without_gradients(lambda: forms.clip(clip_BTCHW))
    return lambda: _without_gradients(lambda: _stream(forms.stream, clip_BTCHW))


def _train(model: nn.Module, clip_BTCHW: torch.Tensor) -> None:
    """One step of plain SGD, by hand (torch.optim imports 140 MiB); the rate is 0 so that nothing overflows."""
    logits_BN = model(clip_BTCHW)
    nn.functional.cross_entropy(logits_BN, torch.zeros(1, dtype=torch.long, device=logits_BN.device)).backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.add_(p.grad, alpha=0.0)


def _stream(stream: Any, clip_BTCHW: torch.Tensor) -> None:
    """The clip, and what the delay of the stream asks for more, so that every cache and window is full."""
    num_frames, state = clip_BTCHW.shape[1], stream.init_state(clip_BTCHW[:, 0])
    for tick in range(num_frames + stream.delay_ticks):
        _, state = stream.step(clip_BTCHW[:, tick % num_frames], state)


def _without_gradients(work: Callable[[], Any]) -> None:
    with torch.no_grad():
        work()


def _load_kernels(device: str) -> None:
    """A training step of a tiny net: loads the libraries, which would count as the model's."""
    _train(_Tiny().to(device), torch.rand(1, 4, 3, 16, 16, device=device))


class _Tiny(nn.Module):
    """A convolution, a norm, attention and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(nn.Conv3d(3, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(), nn.Conv3d(16, 8, 1))
        self.head = nn.Linear(8, 2)

    def forward(self, clip_BTCHW: torch.Tensor) -> torch.Tensor:
        pooled = self.maps(clip_BTCHW.transpose(1, 2)).mean((2, 3, 4)).reshape(1, 1, 2, 4)
        return self.head(nn.functional.scaled_dot_product_attention(pooled, pooled, pooled).reshape(1, 8))


def _restart_peak() -> bool:
    """Ask Linux to count the peak of the resident memory anew; whether it does."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _rss_bytes() -> int:
    try:
        kib = proc_kib(Path("/proc/self/status").read_text(), "VmRSS")
    except OSError:
        kib = None
    if kib is None:
        raise InputError("this system does not tell the resident memory of a process in /proc; measure on Linux")
    return kib * 1024


def main(argv: list[str]) -> None:
    """The command: prints one line of JSON."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("work", choices=get_args(Work))
    parser.add_argument("--num_frames", type=int, default=16)
    for name, default in (("size_px", 112), ("answer_every", 8), ("num_classes", 21), ("num_threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    case = Case(**vars(parser.parse_args(argv)))
    if case.num_frames < 1:
        raise ModelError(f"{case.num_frames = }; expected 1 or more")
    sys.stdout.write(json.dumps(asdict(measure_here(case))) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
