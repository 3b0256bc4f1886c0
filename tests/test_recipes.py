"""Recipes: runs are done once and kept; what is printed comes from the records; a small run of each goes through."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sidestream.report import read_json_lines

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
NAMES = ("inception_keypoints", "sideways_actions", "sideways_frame_rate", "sideways_pictures", "predictive_keypoints")


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(RECIPES))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name in (*NAMES, "records"):
            del sys.modules[name]


def recipe(name: str) -> ModuleType:
    return __import__(name)


class Result:
    """As much of a ``TrainResult`` as the records want."""

    def __init__(self, accuracy: float) -> None:
        self.seconds = 1.26
        self.history = ({"kind": "epoch", "epoch": 0, "updates": 3, "num_skipped": 0, "test_accuracy": accuracy},)


def test_what_is_done_is_not_repeated(tmp_path: Path) -> None:
    records = recipe("records")
    results, seen = tmp_path / "results.jsonl", []

    def run(cell: dict[str, Any], out: Path) -> Result:
        assert out.parent.is_dir()
        seen.append(cell["seed"])
        if cell["seed"] == 2 and seen.count(2) == 1:
            raise RuntimeError("power cut")
        return Result(cell["seed"] / 3)

    cells = [{"variant": "a", "seed": seed} for seed in (1, 2, 3)]
    with pytest.raises(RuntimeError):
        records.run_all(cells, run, results, command="x", runs=None)
    records.run_all(cells, run, results, command="x", runs=None)
    assert seen == [1, 2, 2, 3]
    found = read_json_lines(results)
    assert [r["cell"] for r in found] == cells
    assert found[0]["history"] == [{"epoch": 0, "test_accuracy": 0.33333}]
    assert records.last(found[2], "test_accuracy") == 1.0
    assert records.mean_and_spread([0.1, 0.2, 0.6], 100) == "30.0 ± 26.5 (3)"  # variance (400 + 100 + 900) / 2 = 700
    records.draw_curves({"a": {"one": found}}, "test_accuracy", tmp_path / "c.png", label="%")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_are_kept_are_made_where_they_are_missing_and_others_when_asked_for(tmp_path: Path) -> None:
    records = recipe("records")
    results, runs, seen = tmp_path / "results.jsonl", tmp_path / "runs", []
    cells = [{"variant": "a", "seed": seed} for seed in (1, 2)]

    def run(cell: dict[str, Any], out: Path) -> Result:
        out.mkdir(parents=True, exist_ok=False)
        seen.append(cell["seed"])
        if seen == [1, 2]:
            raise RuntimeError("power cut")
        (out / "weights").write_text(f"{cell['seed']} by run {len(seen)}", encoding="utf-8")
        return Result(len(seen) / 8)

    def go(kept: Path | None, **more: bool) -> None:
        records.run_all(cells, run, results, command="x", runs=kept, **more)

    with pytest.raises(RuntimeError):
        go(runs)
    go(runs)
    assert seen == [1, 2, 2]  # what was broken off is begun anew
    go(runs)
    go(None)
    assert seen == [1, 2, 2]
    shutil.rmtree(runs / "a-1")
    go(runs)
    assert seen == [1, 2, 2, 1]  # as after a clone, which has the records and no weights
    assert (runs / "a-1" / "run" / "weights").read_text(encoding="utf-8") == "1 by run 4"
    go(runs, again=True)
    assert seen == [1, 2, 2, 1, 1, 2]
    assert [(r["cell"]["seed"], records.last(r, "test_accuracy")) for r in records.known(results)] == [
        (1, 5 / 8),
        (2, 6 / 8),
    ]
    assert len(read_json_lines(results)) == 5


@pytest.mark.parametrize("name", NAMES)
def test_the_table_is_that_of_the_records(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = recipe(name)
    kept = (module.FOLDER / "table.md").read_text(encoding="utf-8")
    readme = (module.FOLDER / "README.md").read_text(encoding="utf-8")
    (tmp_path / "results.jsonl").write_bytes((module.FOLDER / "results.jsonl").read_bytes())
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    table = module.report()
    assert table.strip() == kept.strip()
    assert all(line in readme for line in table.splitlines()), "README.md shows another table than table.md"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "inception_keypoints"])  # has a file of its own
def test_one_short_run(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data_dir: Path) -> None:
    module = recipe(name)
    make = module.TrainConfig
    monkeypatch.setattr(module, "TrainConfig", lambda **options: make(**{**options, "epochs": 1}))
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    cell = {
        "sideways_actions": {"setting": "small", "model": "simple_cnn", "variant": "skip-sideways", "seed": 0},
        "sideways_frame_rate": {"setting": "small", "variant": "sideways", "frame_step": 2, "seed": 0},
        "sideways_pictures": {"setting": "small", "task": "future", "variant": "skip-sideways", "seed": 0},
        "predictive_keypoints": {"setting": "small", "variant": "parallel, distilled", "seed": 0},
    }[name]
    result = getattr(module, name)(cell, tmp_path / "run")
    assert result.num_epochs == 1
    assert result.history[0]["test_records"] == {"sideways_actions": 268, "predictive_keypoints": 176}.get(name, 30)
