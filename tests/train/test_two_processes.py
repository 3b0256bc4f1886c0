"""Two processes with half of each batch (DDP over gloo) end where one process ends, and leave one folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train.two_processes import plain_fit

from sidestream.report import read_json_lines


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_halves_are_one_batch(tmp_path: Path) -> None:
    plain_fit(tmp_path / "one", 8)
    script = Path(__file__).with_name("two_processes.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path / "two"), "4"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    logs = [[r for r in read_json_lines(tmp_path / n / "log.jsonl") if r["kind"] == "epoch"] for n in ("one", "two")]
    assert [r["epoch"] for r in logs[1]] == [0, 1]
    for alone, together in zip(*logs, strict=True):
        assert together["test_records"] == alone["test_records"] == 16
        assert together["test_accuracy"] == alone["test_accuracy"]
        assert together["test_loss"] == pytest.approx(alone["test_loss"], rel=1e-4)
