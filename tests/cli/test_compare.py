"""``sidestream compare`` on tiny models: files, restart, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sidestream.cli import main

FLAGS = ["--size", "32", "--num-frames", "4", "--lengths", "4", "--repeats", "1", "--seconds", "0.01", "--threads", "1"]
MODELS = ["timm/test_resnet", "timm/test_vit"]


def test_writes_records_tables_and_a_picture_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sidestream.evals import compare_memory
    from sidestream.evals.footprint import Footprint

    pytest.importorskip("matplotlib")
    monkeypatch.setattr(compare_memory, "measure_footprint", lambda case: Footprint(case.num_frames * 2**20, 7, True))
    accuracy = tmp_path / "accuracy.jsonl"
    accuracy.write_text(json.dumps({"model": MODELS[0], "method": "scratch", "top1": 0.125}) + "\n")
    out = tmp_path / "out"
    parts = "params,flops,latency"
    flags = ["--size", "160", *FLAGS[2:], "--out", str(out), "--accuracy", str(accuracy)]  # the size test_vit wants
    assert main(["compare", *MODELS, *flags, "--parts", parts]) == 0
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(r["part"], r["model"]) for r in records if r["part"] != "latency"] == [
        ("params", MODELS[0]),
        ("params", MODELS[1]),
        ("flops", MODELS[0]),
        ("flops", MODELS[1]),
    ]
    assert sorted(r["model"] for r in records if r["part"] == "latency") == sorted(MODELS)
    assert not any("error" in r for r in records)
    tables = (out / "tables.md").read_text()
    assert "12.5" in tables
    assert "torch" in tables.splitlines()[0]
    assert (out / "compare.png").read_bytes()[:4] == b"\x89PNG"
    shown = capsys.readouterr()
    assert "which its text does not tell apart" in shown.out
    assert f"params, {MODELS[0]}: done" in shown.err.splitlines()
    assert f"latency, {MODELS[1]}: repeat 1" in shown.err.splitlines()
    assert main(["compare", MODELS[0], *flags, "--parts", "params,memory"]) == 0
    again = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert again[: len(records)] == records
    added = again[len(records) :]
    assert [(r["work"], r["model"]) for r in added] == [(w, MODELS[0]) for w in ("clip", "stream", "train")]
    assert all(r["peak_bytes"] == 4 * 2**20 for r in added)


def test_the_order_given_says_who_stands_for_a_family(tmp_path: Path) -> None:
    """Also where another one was measured first; and each is measured once."""
    flags = [*FLAGS, "--parts", "params", "--out", str(tmp_path)]
    assert main(["compare", MODELS[0], *flags]) == 0
    assert main(["compare", MODELS[1], MODELS[0], MODELS[1], *flags]) == 0
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["model"] for line in lines] == MODELS
    assert f"frame by frame (2D): {MODELS[1]}" in (tmp_path / "tables.md").read_text()


def test_other_settings_go_to_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", MODELS[0], *FLAGS, "--parts", "params", "--out", str(tmp_path)]
    assert main(command) == 0
    assert main([*command, "--answer-every", "3"]) == 2
    assert "give another --out" in capsys.readouterr().err
    for flag in ("--num-frames", "--threads", "--lengths"):
        assert main([*command[:2], flag, "0"]) == 2
        assert f"{flag} 0; expected 1 or more" in capsys.readouterr().err
    assert main(["compare", MODELS[0], "--parts", "speed", "--out", str(tmp_path / "x")]) == 2
    assert "unknown part 'speed'" in capsys.readouterr().err
