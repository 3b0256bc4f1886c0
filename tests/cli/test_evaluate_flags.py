"""What ``sidestream evaluate`` refuses: flags that a mode does not read, values, models and places; before the work."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sidestream.cli import main
from sidestream.cli.evaluate import evaluate
from sidestream.cli.evaluate_flags import MODES, READ_IN
from sidestream.evals.streaming import Answer, Classes, ClassLabel, FrameTruth, write_answers, write_truth
from sidestream.models import create_model
from sidestream.models.pretrained import save_pretrained
from sidestream.models.weights import save_weights

CLASSES = ["--data", "synthetic_shapes", "--model", "simple_cnn", "--size", "32", "--weights", "random"]
POINTS = ["--data", "synthetic", "--model", "keypoint_cnn", "--head", "keypoints", "--size", "32", "--num-frames", "2"]
RANDOM = [*POINTS, "--weights", "random"]
LIVE = [*RANDOM, "--max-clips", "1", "--streaming"]
EVERYTHING = ["--max-clips", "1", "--predictive", "--wiring", "sequential", "--frame-rate", "-5", "--stages", "-3"]
EVERYTHING += ["--policy", "foo", "--runtime-ms", "-3", "--eta", "-9", "--profile", "nope", "--out", "nothing"]
LOG = ["--log", "a", "--truth", "b"]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making a model is more work than a refusal may take."""

    def fail(*words: Any, **more: Any) -> None:
        raise AssertionError("a model was made")

    monkeypatch.setattr("sidestream.models.create_model", fail)
    monkeypatch.setattr("sidestream.models.pretrained.from_pretrained", fail)


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["evaluate", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    return error.removeprefix("sidestream: ")


def test_every_flag_says_where_it_is_read() -> None:
    assert set(READ_IN) == set(inspect.signature(evaluate).parameters)
    assert {mode for modes in READ_IN.values() for mode in modes.split()} == set(MODES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [*CLASSES, *EVERYTHING],
            "--out, --frame-rate, --stages, --wiring, --predictive, --eta, --runtime-ms, --profile, --policy: nothing "
            "reads them where classes are judged offline; leave them out, or add --streaming",
        ),
        (
            [*RANDOM, "--runtime-ms", "60"],
            "--runtime-ms: nothing reads it where keypoints are judged offline; leave it",
        ),
        ([*RANDOM, "--forecast", "--eta", "1"], "--eta, --forecast: nothing reads them where keypoints are judged off"),
        ([*RANDOM, "--batch-size", "4"], "--batch-size: nothing reads it where keypoints are judged offline; leave it"),
        (
            [*LIVE, "--policy", "idle-next"],
            "--policy: nothing reads it where a model is judged live on this machine's ",
        ),
        ([*LIVE, "--policy", "idle-next"], "leave it out, or add --runtime-ms or --profile"),
        (
            [*LIVE, "--runtime-ms", "9", "--threads", "2", "--executor", "inline"],
            "--executor, --threads: nothing reads",
        ),
        (
            [*POINTS, "--weights", "w", "--seed", "3"],
            "--seed: nothing is drawn by it, as keypoint_cnn has its own w",
        ),
        ([*CLASSES, "--weights", "w", "--seed", "3"], "--seed: nothing reads it where classes are judged offline"),
        (
            [*LOG, "--streaming", "--out", "foo", "--frame-rate", "50"],
            "--out, --frame-rate, --streaming: nothing reads them where an earlier run is scored; leave them out",
        ),
        ([*LIVE, "--threads", "0"], "--threads 0; give 1 or more"),
        ([*LIVE, "--wiring", "foo"], "unknown wiring 'foo'; expected one of sequential"),
        ([*LIVE, "--executor", "foo"], "unknown executor 'foo'; expected one of auto"),
        ([*LIVE, "--runtime-ms", "9", "--policy", "lazy"], "unknown policy 'lazy'; expected one of idle-free"),
        ([*LIVE, "--frame-rate", "-5"], "--frame-rate -5.0; give frames per second above 0"),
        ([*LIVE, "--stages", "-3"], "--stages -3; give 1 or more"),
        ([*LIVE, "--runtime-ms", "3", "-5"], "--runtime-ms -5; give milliseconds, 0 or more"),
        ([*LIVE, "--runtime-ms", "nan"], "--runtime-ms nan; give milliseconds, 0 or more"),
        ([*LIVE, "--runtime-ms", "5", "--profile", "p"], "simulate one device, so leave one of them out"),
        ([*LIVE, "--eta", "-2"], "--eta -2.0; give -1 or more"),
        ([*CLASSES, "--batch-size", "0"], "--batch-size 0; give 1 or more"),
        ([*CLASSES, "--max-clips", "0"], "--max-clips 0; give 1 or more"),
        ([*CLASSES, "--seed", "-1"], "--seed -1; give 0 or more"),
        ([*CLASSES, "--streaming", "--forecast"], "--forecast moves points and boxes, but --head is classes"),
        (["--data", "synthetic", "--model", "keypoint_cnn"], "keypoint_cnn answers keypoints; give --head keypoints"),
        (
            ["--data", "synthetic", "--model", "conv_autoencoder"],
            "conv_autoencoder answers pictures, which evaluate can",
        ),
        ([*POINTS], "keypoint_cnn has no default weights"),
        ([*POINTS, "--weights", "no.pt"], "there is no weights file 'no.pt'"),
        (["--data", "synthetic", "--model", "no_such"], "unknown model 'no_such'"),
        ([*RANDOM, "--json", "nodir/x.json"], "--json nodir/x.json: there is no folder nodir; make it first"),
        ([*RANDOM, "--json", "."], "--json . is a folder; give the name of a file"),
        ([*RANDOM, "--out", "clip.mp4"], "clip.mp4 is a file; give the name of a folder"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_it_is_refused_before_a_model_is_made(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.mp4").touch()
    assert message in refusal(words, capsys)
    assert [each.name for each in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two saved models, weights of one of them, and a folder with nothing in it."""
    made = tmp_path_factory.mktemp("models")
    save_pretrained(create_model("simple_cnn", num_classes=5), made / "classes")
    points = create_model("keypoint_cnn", num_classes=3)
    save_pretrained(points, made / "points")
    save_weights(points, made / "points.safetensors")
    (made / "nomodel").mkdir()
    return made


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "./classes", "--head", "keypoints"], "'./classes' answers classes; give --head classes"),
        (["--model", "./points"], "'./points' answers keypoints; give --head keypoints"),
        (["--model", "nomodel"], "the folder 'nomodel' holds no saved model (it has no config.json), and no model has"),
        (["--model", "./nomodel"], "there is no readable config.json in 'nomodel'"),
        (
            ["--model", "points", "--head", "keypoints", "--weights", "random"],
            "'points' has its own weights, but --weig",
        ),
        (
            ["--model", "points", "--head", "keypoints", "--weights", "w.pt"],
            "but --weights w.pt was given; leave it out",
        ),
        (
            ["--model", "points", "--head", "keypoints", "--seed", "3"],
            "--seed: nothing is drawn by it, as points has its own weights and head",
        ),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_what_a_folder_holds(
    words: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert message in refusal(["--data", "synthetic", *words], capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (lambda f: [*POINTS, "--model", str(f / "points")], "answers 3 keypoints, but synthetic has 5; evaluate it on"),
        (lambda f: [*POINTS, "--weights", str(f / "points.safetensors")], "keypoint_cnn: the weights in"),
        (lambda f: [*LIVE, "--size", "47"], "frames of 47 x 47 px; it takes multiples of 16: resize or crop them"),
        (lambda f: [*RANDOM, "--size", "47"], "frames of 47 x 47 px; it takes multiples of 16: resize or crop them"),
        (lambda f: [*LIVE, "--predictive"], "--predictive: no answer of this circuit is older than its frame"),
        (lambda f: [*RANDOM, "--predictive"], "--predictive: no answer of this circuit is older than its frame"),
        (
            lambda f: [*LIVE, "--runtime-ms", "60", "20", "10"],
            "3 stages for a circuit of 1; give one for the whole net",
        ),
        (
            lambda f: [*LIVE, "--runtime-ms", "60", "20", "10", "--stages", "2", "--wiring", "sequential"],
            "3 stages for a circuit of 2; give one for the whole net, or 2, one for each stage",
        ),
    ],
)
def test_what_needs_the_model_is_refused_before_a_clip_is_judged(
    words: Callable[[Path], list[str]],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*words: Any, **more: Any) -> None:
        raise AssertionError("clips were judged")

    monkeypatch.setattr("sidestream.evals.streaming.judge.judge", fail)
    assert message in refusal(words(folder), capsys)


def test_a_circuit_that_predicts_is_judged(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--predictive", "--stages", "2", "--runtime-ms", "0"]
    assert main(["evaluate", *LIVE, *words]) == 0
    assert "| streaming |" in capsys.readouterr().out


def test_a_log_of_classes_has_no_forecast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, truth = tmp_path / "answers.jsonl", tmp_path / "truth.jsonl"
    write_truth(truth, [FrameTruth("a", n, n / 10, ClassLabel(1)) for n in range(3)])
    write_answers(log, [Answer("a", n, n / 10, n / 10, n / 10, Classes(((1, 1.0),))) for n in range(3)])
    words = ["--log", str(log), "--truth", str(truth)]
    assert "--forecast moves points and boxes, which" in refusal([*words, "--forecast"], capsys)
    assert main(["evaluate", *words]) == 0


def test_a_folder_that_goes_away_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sidestream.cli.evaluate_flags.check_out_folder", lambda flag, path: None)
    (tmp_path / "file").touch()
    error = refusal([*RANDOM, "--max-clips", "1", "--out", str(tmp_path / "file")], capsys)
    assert error == f"--out {tmp_path / 'file'}: cannot be made (File exists); give another folder"
