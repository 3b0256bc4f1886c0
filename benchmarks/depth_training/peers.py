"""torch.distributed.pipelining as a peer: two processes on this machine over gloo, one stage each, the same net.

    with Peers({"vgg": "vgg8", "splits": [2]}) as peers:
        peers.step("gpipe", num_micro=8, num_frames=32, size_px=112, save=folder)

Each rank is this file as a program, which reads commands as lines of JSON and answers with one line each.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nets import make, random_frames
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from sidestream.evals.footprint import _ALLOCATOR, _restart_peak, _rss_bytes
from sidestream.report.measure import peak_rss_bytes

NUM_RANKS = 2
SCHEDULES = ("gpipe", "1f1b")


def unavailable() -> str | None:
    """Why this cannot run here; None where it can."""
    if not dist.is_available():
        return "this torch has no torch.distributed"
    if not dist.is_gloo_available():
        return "this torch has no gloo"
    return None


class Peers:
    """Two processes that wait for commands; ``step`` gives one answer per rank."""

    def __init__(self, net: dict[str, Any], *, lr: float = 0.0, exact_memory: bool = False) -> None:
        self._folder = tempfile.TemporaryDirectory()
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        if exact_memory:
            env |= _ALLOCATOR
        meeting = str(Path(self._folder.name) / "meeting")
        self._ranks = [
            subprocess.Popen(
                [sys.executable, __file__, json.dumps({"rank": r, "meeting": meeting, "net": net, "lr": lr})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=env,
            )
            for r in range(NUM_RANKS)
        ]
        self._answers()  # both are ready

    def step(self, schedule: str, **options: Any) -> list[dict[str, Any]]:
        """One step; ``save``: a folder for the gradients, one file per rank."""
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps({"schedule": schedule, **options}) + "\n")
            rank.stdin.flush()
        return self._answers()

    def _answers(self) -> list[dict[str, Any]]:
        lines = [rank.stdout.readline() for rank in self._ranks if rank.stdout is not None]
        if not all(lines):
            raise RuntimeError("a rank of torch.distributed.pipelining has died; see its words above")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        for rank in self._ranks:
            if rank.stdin is not None:
                rank.stdin.close()
        for rank in self._ranks:
            try:
                rank.wait(timeout=60)
            except subprocess.TimeoutExpired:  # all answers are in; nothing is lost
                rank.kill()
                rank.wait()
        self._folder.cleanup()

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def gradients_in(folder: Path) -> list[dict[str, Tensor]]:
    """What ``save`` has left: per stage by name."""
    return [load_file(folder / f"rank{r}.safetensors") for r in range(NUM_RANKS)]


class _Rank:
    def __init__(self, given: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self.rank, self.net = given["rank"], given["net"]
        dist.init_process_group(
            "gloo",
            init_method=f"file://{given['meeting']}",
            rank=self.rank,
            world_size=NUM_RANKS,
            timeout=timedelta(seconds=120),
        )
        self.module = make(self.net)[self.rank]
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=given["lr"], momentum=0.9)
        self.schedules: dict[tuple[str, int, int, int], tuple[Any, list[float]]] = {}

    def _schedule(self, name: str, num_micro: int, num_frames: int, size_px: int) -> tuple[Any, list[float]]:
        """The schedule for these shapes, and a list that gathers the seconds at work."""
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

        key = name, num_micro, num_frames, size_px
        if key not in self.schedules:
            stage = PipelineStage(self.module, self.rank, NUM_RANKS, torch.device("cpu"))
            busy: list[float] = []
            for method in ("forward_one_chunk", "backward_one_chunk"):
                setattr(stage, method, _timed(getattr(stage, method), busy))
            kind = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[name]
            self.schedules[key] = kind(stage, num_micro, loss_fn=F.cross_entropy), busy
        return self.schedules[key]

    def step(
        self, schedule: str, *, num_micro: int, num_frames: int, size_px: int, save: str | None = None
    ) -> dict[str, Any]:
        made, busy = self._schedule(schedule, num_micro, num_frames, size_px)
        frames, labels = random_frames(num_frames, size_px, self.net.get("dtype", "float32"))
        busy.clear()
        self.module.zero_grad()
        gc.collect()
        is_exact = _restart_peak()
        before = _rss_bytes()
        dist.barrier()
        started = time.perf_counter()
        if self.rank == 0:
            made.step(frames)
        else:
            made.step(target=labels)
        self.optimizer.step()
        dist.barrier()
        seconds = time.perf_counter() - started
        if save is not None:
            found = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
            save_file(found, Path(save) / f"rank{self.rank}.safetensors")
        return {
            "seconds": seconds,
            "busy_seconds": sum(busy),
            "peak_bytes": peak_rss_bytes() - before,
            "rss_bytes": _rss_bytes(),
            "parameter_bytes": sum(p.numel() * p.element_size() for p in self.module.parameters()),
            "is_exact": is_exact,
        }


def _timed(work: Callable[..., Any], busy: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return work(*args, **kwargs)
        finally:
            busy.append(time.perf_counter() - started)

    return timed


def main() -> None:
    rank = _Rank(json.loads(sys.argv[1]))
    print("{}", flush=True)
    for line in sys.stdin:
        print(json.dumps(rank.step(**json.loads(line))), flush=True)
    sys.stdout.flush()
    os._exit(0)  # without waiting for the other rank


if __name__ == "__main__":
    main()
