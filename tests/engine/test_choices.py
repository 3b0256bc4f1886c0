"""Choices of ``tune`` that are kept: found again without measuring, never for anything else, and never broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from contract import assert_equal
from sidestream.engine import choices, run
from sidestream.engine import tune as tuning
from sidestream.engine.choices import folder, keep, kept_files, key_of, load
from sidestream.engine.tune import tune
from sidestream.nn.combine import Chain, PerFrame
from sidestream.nn.shift import OnlineShift


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SIDESTREAM_CACHE", str(tmp_path))


def small_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()).eval()


def stream_model() -> nn.Module:
    convs = [PerFrame(nn.Conv2d(3, 8, 3, padding=1)), OnlineShift(), PerFrame(nn.Conv2d(8, 8, 3, padding=1))]
    return Chain(*convs).eval()


FRAME = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("make", "backend"), [(small_model, "eager"), (stream_model, "eager"), (stream_model, "onnxruntime")]
)
def test_the_second_start_measures_nothing_and_runs_the_same(
    make: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = make()
    options: dict[str, Any] = {"num_stages": 2, "backends": (backend,), "seconds": 0.1, "remembers": True}
    first = tune(model, FRAME, **options)
    assert not first.is_kept
    assert len(kept_files()) == 1
    monkeypatch.setattr(tuning, "measure", None)  # fails when called
    again = tune(model, FRAME, **options)
    assert again.is_kept
    assert (again.backend, again.executor, again.trials) == (first.backend, first.executor, first.trials)
    assert [s.name for s in again.circuit.stages] == [s.name for s in first.circuit.stages]
    assert {s.backend for s in again.circuit.stages} == {backend}
    frames = [FRAME, 2 * FRAME, FRAME.neg()]
    for a, b in zip(run(again.circuit, frames), run(first.circuit, frames), strict=True):
        assert_equal(a.value.clone(), b.value.clone())
    with pytest.raises(TypeError):
        tune(model, FRAME, **{**options, "remembers": False})


def test_another_model_input_wish_version_or_machine_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, wish = small_model(), {"stages": 2}
    keys = [key_of(model, FRAME, wish)]
    assert key_of(small_model(), FRAME.clone(), {"stages": 2}) == keys[0]  # other weights cost the same
    keys += [key_of(model, FRAME[..., :16], wish), key_of(model, FRAME.double(), wish), key_of(model, FRAME, {})]
    keys += [key_of(model, FRAME.to(memory_format=torch.channels_last), wish)]
    keys += [key_of(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2)).eval(), FRAME, wish)]
    keys += [key_of(small_model().train(), FRAME, wish)]
    monkeypatch.setattr(choices, "package_version", lambda name: "99")
    keys += [key_of(model, FRAME, wish)]
    monkeypatch.setattr(choices, "num_cores", lambda: 99)
    keys += [key_of(model, FRAME, wish)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"trials": 3}', '{"trials": [], "unit_costs": [1]}'])
def test_what_cannot_be_read_is_measured_anew(text: str) -> None:
    key = "a" * 32
    folder().mkdir(parents=True)
    (folder() / f"{key}.json").write_text(text)
    assert load(key) is None


def test_a_choice_that_does_not_fit_any_more_is_measured_anew(caplog: pytest.LogCaptureFixture) -> None:
    model = small_model()
    options: dict[str, Any] = {"num_stages": 2, "backends": ("eager",), "seconds": 0.1, "remembers": True}
    tune(model, FRAME, **options)
    (file,) = kept_files()
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "unit_costs": [1.0]}))
    assert not tune(model, FRAME, **options).is_kept
    assert "does not fit the model any more" in caplog.text
    assert len(json.loads(file.read_text())["unit_costs"]) > 1


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SIDESTREAM_CACHE", str(tmp_path / "file"))
    keep("a" * 32, choices.Kept("eager", "threads", 2, (1.0,), "", ()))
    assert load("a" * 32) is None
    assert list(kept_files()) == []


def test_nothing_is_kept_unless_asked() -> None:
    tune(small_model(), FRAME, num_stages=2, backends=("eager",), seconds=0.1)
    assert list(kept_files()) == []
