"""Peak memory of one training step on one clip, each in a process of its own: ``python memory.py CASES`` prints JSON.

As benchmarks/training_memory: the most that was resident during the step beyond what was held before it, with one
malloc arena and large blocks by mmap; one set of gradients is subtracted.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from gpipe import GPipe
from nets import make, random_frames
from schedules import fresh_pairs
from torch import Tensor
from torch.nn import functional as F

from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.wiring import parallel, pipelined
from sidestream.engine import run
from sidestream.engine.rules.exact import Exact
from sidestream.engine.rules.sideways import Sideways
from sidestream.evals.footprint import _ALLOCATOR, _restart_peak, _rss_bytes
from sidestream.report.measure import peak_rss_bytes

NUM_MICRO = 8
METHODS = ("bptt", "gpipe", "gpipe, recomputing", "1f1b", "1f1b, recomputing", "sideways", "skip-sideways")


def clip_step(method: str, modules: list[torch.nn.Module], frames_TCHW: Tensor, labels_T: Tensor) -> Callable[[], Any]:
    """One clip to its gradients, on one thread."""
    loss = F.cross_entropy
    if method == "bptt":
        net = torch.nn.Sequential(*modules)
        return lambda: loss(net(frames_TCHW), labels_T).backward()
    if method.startswith("gpipe"):
        pipe = GPipe(modules, loss, recomputes="recomputing" in method)
        return lambda: pipe.step(frames_TCHW.chunk(NUM_MICRO), labels_T.chunk(NUM_MICRO))
    skips = "add" if method == "skip-sideways" else "none"
    stages = stages_of(modules, frames_TCHW[:1], skips=skips)
    circuit = (parallel if skips == "add" else pipelined)(stages)
    if method.startswith("1f1b"):
        rule: Any = Exact(loss, keep="inputs" if "recomputing" in method else "graph")
    else:
        rule = Sideways(loss, update="clip")
    return lambda: [None for _ in run(circuit, fresh_pairs(frames_TCHW, labels_T), rule=rule, executor="inline")]


def measure(case: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    clip_step(case["method"], make({"row": 3, "width": 4}), *random_frames(16, 16))()  # loads the libraries
    modules = make({"row": case["num_stages"]})
    frames_TCHW, labels_T = random_frames(case["num_frames"], case["size_px"])
    step = clip_step(case["method"], modules, frames_TCHW, labels_T)
    gc.collect()
    is_exact = _restart_peak()
    before = _rss_bytes()
    step()
    parameter_bytes = sum(p.numel() * p.element_size() for m in modules for p in m.parameters())
    return {
        "activation_bytes": peak_rss_bytes() - before - parameter_bytes,
        "parameter_bytes": parameter_bytes,
        "clip_bytes": frames_TCHW.numel() * frames_TCHW.element_size(),
        "is_exact": is_exact,
    }


def measure_all(cases: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """``measure`` of each case, in a process of its own."""
    env = {**os.environ, **_ALLOCATOR, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, json.dumps(list(cases))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as server:
        assert server.stdout is not None
        for case in cases:
            line = server.stdout.readline()
            if not line:
                raise RuntimeError(f"{case}: the process has died; see its words above")
            yield json.loads(line)


def _serve(cases: Sequence[dict[str, Any]]) -> None:
    """Fork for each case: this process has the libraries, and has never computed anything."""
    for case in cases:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            print(json.dumps(measure(case)), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            raise SystemExit(1)


def cases(*, quick: bool = False) -> list[dict[str, Any]]:
    """All lengths at eight stages, all depths at 64 frames."""
    if quick:
        return [
            {"method": m, "num_stages": k, "num_frames": t, "size_px": 32}
            for m in METHODS
            for k, t in ((3, 16), (3, 32))
        ]
    shapes = [(8, t) for t in (8, 16, 32, 64, 128)] + [(k, 64) for k in (2, 4, 16)]
    return [
        {"method": m, "num_stages": k, "num_frames": t, "size_px": 48}
        for k, t in shapes
        for m in METHODS
        if not (m == "skip-sideways" and k == 2)
    ]


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
