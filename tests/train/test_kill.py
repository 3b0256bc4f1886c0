"""A run that is killed at any moment and resumed ends as one that was never stopped, to the bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from train.killed import RUNS, run_of
from train.tiny import tiny_fit

from sidestream.report import read_json_lines

WORKER = Path(__file__).with_name("tiny.py")
ROOT = WORKER.parent.parent.parent


def start(folder: Path, how: str, epochs: int, optimizer: str) -> subprocess.Popen:
    command = [sys.executable, str(WORKER), str(folder), how, str(epochs), optimizer]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)


def kill_after(run: subprocess.Popen, folder: Path, num_lines: int, pause_seconds: float = 0.0) -> bool:
    """SIGKILL once the log has so many lines; False where the run ended before."""
    until = time.monotonic() + 120
    while time.monotonic() < until and run.poll() is None:
        log = folder / "log.jsonl"
        if log.exists() and log.read_bytes().count(b"\n") >= num_lines:
            time.sleep(pause_seconds)
            run.send_signal(signal.SIGKILL)
            run.wait()
            return True
        time.sleep(0.002)
    assert run.poll() == 0, run.stderr.read().decode()
    return False


def assert_same_run(broken: Path, whole: Path) -> None:
    for name in ("last.safetensors", "best.safetensors", "checkpoint.safetensors"):
        ours, theirs = load_file(broken / name), load_file(whole / name)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours), name
    times = {"seconds", "clips_per_second"}
    logs = [read_json_lines(folder / "log.jsonl") for folder in (broken, whole)]
    logs = [[{k: v for k, v in record.items() if k not in times} for record in log] for log in logs]
    assert logs[0] == logs[1]


def test_a_killed_run_resumed_equals_an_unbroken_one(tmp_path: Path, one_thread: None) -> None:
    broken = tmp_path / "broken"
    run = start(broken, "new", 12, "adamw")
    assert kill_after(run, broken, 10)
    before = load_file(broken / "last.safetensors")
    result = tiny_fit(broken, resume=True, epochs=12, optimizer="adamw")
    assert result.num_epochs == 12
    tiny_fit(tmp_path / "whole", epochs=12, optimizer="adamw")
    assert_same_run(broken, tmp_path / "whole")
    assert not before["conv1.weight"].equal(load_file(broken / "last.safetensors")["conv1.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop", "adagrad"])
def test_a_run_killed_many_times_equals_an_unbroken_one(tmp_path: Path, optimizer: str, one_thread: None) -> None:
    broken = tmp_path / "broken"
    kills = 0
    for attempt in range(1, 6):
        run = start(broken, "new" if attempt == 1 else "resume", 60, optimizer)
        kills += kill_after(run, broken, 23 * attempt)
    assert kills >= 4
    tiny_fit(broken, resume=True, epochs=60, optimizer=optimizer)
    tiny_fit(tmp_path / "whole", epochs=60, optimizer=optimizer)
    assert_same_run(broken, tmp_path / "whole")


RULES_WORKER = WORKER.with_name("killed.py")
SLOW = pytest.mark.slow


def start_rule(folder: Path, how: str, name: str) -> subprocess.Popen:
    command = [sys.executable, str(RULES_WORKER), str(folder), how, name]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE)


@pytest.mark.parametrize("name", [n if n == "sideways, every tick" else pytest.param(n, marks=SLOW) for n in RUNS])
def test_a_run_of_any_rule_killed_at_a_random_moment(name: str, tmp_path: Path, one_thread: None) -> None:
    """Wherever in a tick it was: between two checkpoints, or while one is written."""
    chance = random.Random(name)
    broken, kills = tmp_path / "broken", 0
    for attempt in range(1 if name == "sideways, every tick" else 3):
        run = start_rule(broken, "resume" if attempt else "new", name)
        if kill_after(run, broken, chance.randint(2, 5) + 4 * attempt, chance.uniform(0, 0.1)):
            kills += 1
    assert kills
    assert (broken / "checkpoint.safetensors").is_file()
    run_of(broken, name, resume=True)
    run_of(tmp_path / "whole", name)
    assert_same_run(broken, tmp_path / "whole")
