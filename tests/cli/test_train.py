"""``sidestream train``: from a name to a folder of results, resumed, and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data.video_files import make_folder
from safetensors.torch import load_file

from sidestream.cli import main
from sidestream.data import ClipOptions, open_dataset
from sidestream.models import create_model, info_of, input_spec_of
from sidestream.models.info import attach_info
from sidestream.models.pretrained import save_pretrained
from sidestream.report import read_json_lines
from sidestream.train import TrainConfig, fit

SMALL = ["--model", "timm/test_resnet", "--num-frames", "2", "--size", "32", "--epochs", "1", "--num-workers", "1"]
MADE_UP = ["--data", "synthetic", *SMALL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("set"), num_clips=3))


@pytest.fixture(scope="module")
def run(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("train") / "run"
    assert main(["train", "--data", folder, *SMALL, "--seed", "5", "--out", str(out)]) == 0
    return out


def test_a_run_leaves_its_files_and_can_be_taken_up(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((run / "config.json").read_text())
    assert config["train"]["rule"] == "backprop"
    assert config["train"]["seed"] == 5
    assert (config["num_frames"], config["size_px"]) == (2, [32, 32])
    assert config["command"]["model"] == "timm/test_resnet"
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "log.jsonl", "last.safetensors", "best.safetensors", "checkpoint.safetensors"} <= names
    before = {key: value.clone() for key, value in load_file(run / "last.safetensors").items()}
    assert main(["train", "--resume", str(run)]) == 0  # it is done: nothing changes
    after = load_file(run / "last.safetensors")
    assert all(before[key].equal(after[key]) for key in before)
    assert "1 epoch, test accuracy" in capsys.readouterr().out


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two classes with an input spec of its own."""
    torch.manual_seed(3)
    net = create_model("timm/test_resnet", num_classes=2)
    info = info_of(net)
    assert info is not None
    attach_info(net, replace(info, input_spec=replace(info.input_spec, size_px=(48, 48), resize_px=None)))
    return save_pretrained(net, tmp_path_factory.mktemp("saved") / "model")


def test_training_goes_on_from_a_saved_folder(
    saved: Path, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved.parent)
    out, twin = tmp_path / "run", tmp_path / "twin"
    words = ["--num-frames", "2", "--epochs", "1", "--num-workers", "1", "--batch-size", "4", "--seed", "5"]
    assert main(["train", "--data", folder, "--model", "./model", *words, "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["size_px"] == [48, 48]  # the folder's own

    net = create_model("timm/test_resnet", num_classes=2, weights=saved / "model.safetensors")
    spec = replace(input_spec_of(net), size_px=(48, 48), resize_px=None, num_frames=2)
    parts = [open_dataset(folder, part=part, spec=spec, options=ClipOptions(seed=5)) for part in ("train", "test")]
    fit(net, *parts, config=TrainConfig(epochs=1, num_workers=1, batch_size=4, seed=5), out=twin)
    losses = [[r["loss"] for r in read_json_lines(run / "log.jsonl") if r["kind"] == "batch"] for run in (out, twin)]
    assert losses[0]
    assert losses[0] == losses[1]
    before, after = (load_file(run / "last.safetensors") for run in (out, twin))
    assert all(before[key].equal(after[key]) for key in before)
    assert main(["train", "--resume", str(out)]) == 0
    after = load_file(out / "last.safetensors")
    assert all(before[key].equal(after[key]) for key in before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "FOLDER", "--weights", "default"], "has weights of its own, but --weights default was given"),
        (["--data", "FOLDER", "--weights", "random"], "has weights of its own, but --weights random was given"),
        (["--data", "synthetic_shapes"], "model answers 2 classes, and the data has 8 classes"),
        (["--data", "synthetic", "--task", "keypoints"], "model answers 2 classes, and the data has 5 keypoints"),
    ],
)
def test_a_saved_folder_that_does_not_fit_is_refused(
    words: list[str], message: str, saved: Path, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [folder if word == "FOLDER" else word for word in words]
    given = ["--model", str(saved), "--num-frames", "2", "--size", "32", "--epochs", "1"]
    assert main(["train", *words, *given, "--out", str(tmp_path / "OUT")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "OUT").exists()


def test_depth_parallel_rules_with_their_options(folder: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["--model", "simple_cnn", "--num-frames", "9", "--size", "32", "--epochs", "1", "--num-workers", "1"]
    words += ["--rule", "sideways", "--skips", "add", "--update", "3", "--target", "newest", "--loss-delay", "1"]
    assert main(["train", "--data", folder, *words, "--executor", "threads", "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    wanted = {"rule": "sideways", "skips": "add", "update": 3, "target": "newest", "loss_delay": 1}
    assert config["train"].items() >= {**wanted, "executor": "threads", "keep": "graph"}.items()
    before = {key: value.clone() for key, value in load_file(out / "last.safetensors").items()}
    assert main(["train", "--resume", str(out)]) == 0
    after = load_file(out / "last.safetensors")
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)


def test_a_finished_run_is_not_overwritten_and_keeps_its_options(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "last.safetensors").read_bytes()
    assert main(["train", *MADE_UP, "--out", str(run)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--lr", "0.5"]) == 2
    assert "--lr given beside --resume" in capsys.readouterr().err
    assert (run / "last.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--data, --model, --out missing"),
        (["--data", "no/such", "--model", "cnn_gru", "--out", "OUT"], "unknown data 'no/such'"),
        (["--data", "synthetic", "--model", "no_such", "--out", "OUT"], "unknown model 'no_such'"),
        ([*MADE_UP, "--out", "OUT", "--rule", "magic"], "no training rule 'magic'; there are: backprop"),
        (
            [*MADE_UP, "--out", "OUT", "--rule", "sideways", "--model", "simple_cnn"],
            "a clip of 2 frames is too short for the pipeline",
        ),
        (
            [*MADE_UP, "--out", "OUT", "--rule", "exact", "--update", "never"],
            "update is 'never'; expected 'clip', 'tick'",
        ),
        ([*MADE_UP, "--out", "OUT", "--skips", "add"], "need a model that says what its layers are"),
        ([*MADE_UP, "--out", "OUT", "--lr", "0"], "lr is 0.0; give a number above 0"),
        ([*MADE_UP, "--out", "OUT", "--model", "i3d"], "I3D was given 2 frames; it needs 9 or more"),
        (
            [*MADE_UP, "--out", "OUT", "--model", "conv_autoencoder_small"],
            "answers pictures, not classes; give --task autoencode or future",
        ),
        (["--resume", "OUT"], "OUT"),
    ],
)
def test_wrong_inputs_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "OUT")
    assert main(["train", *(out if word == "OUT" else word for word in words)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.count("\n") == 0
    assert not (tmp_path / "OUT").exists()


def test_labels_out_of_range_name_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.csv").write_text("path,label\na.mp4,0\nb.mp4,-3\n")
    words = ["--data", str(tmp_path / "list.csv"), "--model", "cnn_gru", "--out", str(tmp_path / "run")]
    assert main(["train", *words]) == 2
    assert "line 3: label -3 is outside 0 to 0" in capsys.readouterr().err
