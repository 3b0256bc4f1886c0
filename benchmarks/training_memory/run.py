"""Peak memory of one training step on one clip, against the clip's length: backprop, exact, sideways, skip-sideways.

    python benchmarks/training_memory/run.py            # --quick for a look; goes on where it was when stopped

Every case is a fresh process (this file with --case), measured as sidestream.evals.footprint does. Writes
results.jsonl, table.md and memory.png here.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from sidestream.report.measure import machine
from sidestream.report.record import json_lines, read_json_lines

HERE = Path(__file__).parent
LENGTHS = (8, 16, 32, 64, 128)
RULES = {
    "backprop": {"rule": "backprop", "task": "frame"},
    "exact": {"rule": "exact"},
    "sideways": {"rule": "sideways"},
    "sideways, 4 stages": {"rule": "sideways", "num_stages": 4},
    "skip-sideways": {"rule": "sideways", "skips": "projection"},
}
TIMEOUT_SECONDS = 900


def measure(rule: str, num_frames: int, batch_size: int, size_px: int, model: str) -> dict[str, Any]:
    """In this process: one step of the rule, from before it to its peak. Of 8 frames too, in which not all go back."""
    import torch

    from sidestream.evals.footprint import _restart_peak, _rss_bytes
    from sidestream.models import create_model
    from sidestream.report.measure import peak_rss_bytes
    from sidestream.train import with_skips

    torch.set_num_threads(1)
    torch.manual_seed(0)
    _step(create_model("simple_cnn", num_classes=3), torch.rand(1, 16, 3, 32, 32), RULES[rule] | {"skips": "none"})()
    clip_BTCHW = torch.rand(batch_size, num_frames, 3, size_px, size_px) * 2 - 1
    skips = RULES[rule].get("skips", "none")
    net = with_skips(create_model(model, num_classes=21), clip_BTCHW[:, 0], skips).train()
    work = _step(net, clip_BTCHW, RULES[rule])
    gc.collect()
    is_exact = _restart_peak()
    before = _rss_bytes()
    work()
    parameter_bytes = sum(p.numel() * p.element_size() for p in net.parameters())
    return {
        "peak_bytes": peak_rss_bytes() - before,
        "parameter_bytes": parameter_bytes,
        "gradient_bytes": parameter_bytes,
        "optimizer_bytes": parameter_bytes,
        "clip_bytes": clip_BTCHW.numel() * 4,
        "is_exact": is_exact,
    }


def _step(net: Any, clip_BTCHW: Any, options: dict[str, Any]) -> Any:
    """One update with momentum, whose buffers are there before; a rate of 0, so that nothing overflows."""
    import torch

    from sidestream.train import RULES as STEPS
    from sidestream.train import StepContext, TrainConfig
    from sidestream.train.answering import Answering

    config = TrainConfig(**options)
    example_BTCHW = torch.cat([clip_BTCHW, clip_BTCHW], 1)  # the step refuses clips in which not all stages go back
    context = StepContext(net, Answering(net, "frame"), config, lambda loss: loss.backward(), example_BTCHW)
    step = STEPS[config.rule](context)
    optimizers = step.make_optimizers(lambda parameters: torch.optim.SGD(parameters, lr=0.0, momentum=0.9))
    labels_B = torch.zeros(len(clip_BTCHW), dtype=torch.long)

    def update(numbers: Any) -> None:
        for n in numbers:
            optimizers[n].step()
            optimizers[n].zero_grad(set_to_none=True)

    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    update(range(len(optimizers)))
    return lambda: step.step(clip_BTCHW, labels_B, update)


def measure_apart(case: dict[str, Any]) -> dict[str, Any]:
    """``measure`` in a fresh process; {"failed": its last words} where it did not end well."""
    from sidestream.evals.footprint import _ALLOCATOR

    command = [sys.executable, __file__, "--case", json.dumps(case)]
    env = {**os.environ, **_ALLOCATOR, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=env)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {TIMEOUT_SECONDS} s"}
    if done.returncode != 0:
        return {"failed": next(iter(reversed(done.stderr.strip().splitlines())), "no words")[:300]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="vgg8")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--quick", action="store_true", help="a narrow net at 48 px, three lengths; prints only")
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measure(**json.loads(given.case))))
        return
    if given.quick:
        given.model, given.size, given.batches, given.lengths = "vgg8_quarter", 48, [1], [16, 32, 64]
        given.out = given.out / "quick"
        given.out.mkdir(exist_ok=True)
    path = given.out / "results.jsonl"
    known = [r["case"] for r in (read_json_lines(path) if path.exists() else []) if "failed" not in r]
    with json_lines(path, append=True) as write:
        for batch_size in given.batches:
            for num_frames in given.lengths:
                for rule in RULES:
                    case = {"rule": rule, "num_frames": num_frames, "batch_size": batch_size}
                    case |= {"size_px": given.size, "model": given.model}
                    if case not in known:
                        print(f"{rule}, {num_frames} frames, batch {batch_size}", flush=True)
                        write({"case": case, **measure_apart(case), "machine": machine()})
    from table import write_all

    write_all(path, given.out)


if __name__ == "__main__":
    main()
