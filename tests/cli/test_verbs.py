"""The other verbs: chart, models, bench, demo; and the command as a program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sidestream.cli import main
from sidestream.video import read


def test_chart_prints_the_schedule_and_the_forecast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    png = tmp_path / "c.png"
    assert main(["chart", "--model", "timm/test_resnet", "--stages", "3", "--ticks", "4", "--out", str(png)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["tick", "0", "1", "2", "3"]
    assert lines[3].split()[-4:] == [".", ".", "0", "1"]
    assert any("3 stages, pipelined" in line for line in lines)
    assert any(line.startswith("predicted") for line in lines)
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_models_lists_by_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "*resnet50"]) == 0
    names = capsys.readouterr().out.split()
    assert "torchvision/resnet50" in names
    assert "timm/resnet50" in names
    assert main(["models", "nothing-like-this"]) == 2


def test_bench_times_each_candidate_and_appends_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "b.jsonl"
    command = [
        "bench",
        "timm/test_resnet",
        "--stages",
        "2",
        "--backends",
        "eager",
        "--seconds",
        "0.2",
        "--json",
        str(path),
    ]
    assert main(command) == 0
    assert main(command) == 0
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == 6
    assert len({r["candidate"] for r in records}) == 3
    assert all(r["frames_per_second"] > 0 and r["latency_seconds"] > 0 for r in records)
    assert all(r["machine"]["torch"] for r in records)
    assert "fastest: eager, 2 stages" in capsys.readouterr().out
    assert main(["bench", "timm/test_resnet", "--seconds", "0"]) == 2


def test_demo_leaves_clip_videos_chart_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--seconds", "1", "--out", str(out)]) == 0
    names = sorted(p.name for p in out.iterdir())
    assert set(names) - {"chart.png"} == {"clip.mp4", "inline.mp4", "table.md", "threads.mp4"}
    assert read(out / "clip.mp4").num_frames == 60
    table = (out / "table.md").read_text()
    for video, row in (("inline.mp4", "frame by frame"), ("threads.mp4", "pipelined")):
        cells = [c.strip() for c in next(line for line in table.splitlines() if row in line).strip("|").split("|")]
        answered = int(cells[2])
        assert answered > 0
        assert read(out / video).num_frames == 60
        assert int(cells[1]) == answered + int(cells[3])
    assert str(out / "threads.mp4") in capsys.readouterr().out.replace("\n  ", " ").replace("\n", "")


def test_the_command_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "sidestream", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    for verb in ("run", "bench", "chart", "models", "doctor", "demo"):
        assert verb in done.stdout
    done = subprocess.run([sys.executable, "-m", "sidestream", "dance"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2


def test_doctor_starts_where_torch_or_the_command_line_parser_is_broken(tmp_path: Path) -> None:
    for name in ("torch", "tyro"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('broken on purpose')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "sidestream", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "broken on purpose" in done.stdout
    json.loads(done.stdout)


def test_a_chart_at_named_modules_needs_no_number_of_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chart", "--model", "timm/test_resnet", "--cut", "layer2", "layer3"]) == 0
    assert "3 stages, pipelined" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        ["chart", "--model", "timm/test_resnet", "--out", "no/such/folder/c.png"],
        ["chart", "--model", "timm/test_resnet", "--ticks", "0"],
        ["chart", "--model", "timm/test_resnet", "--threads", "0"],
        ["demo", "--seconds", "0"],
        ["demo", "--out", "pyproject.toml"],
        ["bench", "timm/test_resnet", "--backends", "tensorrt"],
        ["doctor", "--loud"],
    ],
)
def test_wrong_input_to_other_verbs(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("sidestream: ")
    assert error.count("\n") == 0
