"""``sidestream evaluate``: offline, live, on a simulated device, from a log, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sidestream.cli import main
from sidestream.data import open_dataset
from sidestream.evals.streaming import (
    Answer,
    Classes,
    ClassLabel,
    FrameTruth,
    RuntimeProfile,
    read_answers,
    read_truth,
    write_answers,
    write_truth,
)
from sidestream.models import create_model
from sidestream.models.create import model_info
from sidestream.models.weights import save_weights
from sidestream.train.hardware import seed_all

FRAMES_PER_CLIP = 12
"""Of the synthetic set: 4 frames of a clip and 8 more."""
SMALL = ["--data", "synthetic", "--model", "timm/test_resnet", "--num-frames", "4", "--size", "32"]
LIVE = [*SMALL, "--streaming", "--max-clips", "4"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(2)
    model = create_model("timm/test_resnet", num_classes=4)
    with torch.no_grad():  # random heads answer one class for all; spread the answers
        for parameter in model.get_classifier().parameters():  # type: ignore[operator]
            parameter.copy_(torch.randn_like(parameter))
    return str(save_weights(model, tmp_path_factory.mktemp("weights") / "w.safetensors"))


def evaluated(words: list[str], tmp_path: Path) -> dict[str, Any]:
    assert main(["evaluate", *words, "--json", str(tmp_path / "result.json")]) == 0
    return json.loads((tmp_path / "result.json").read_text())


def test_offline_accuracy_is_that_of_a_plain_loop(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = evaluated([*SMALL, "--weights", weights], tmp_path)
    spec = model_info("timm/test_resnet").input_spec.replace(size_px=(32, 32), resize_px=None, num_frames=4)
    dataset = open_dataset("synthetic", part="test", spec=spec)
    model = create_model("timm/test_resnet", num_classes=4, weights=weights)
    with torch.no_grad():
        right = [int(model(item.clip_TCHW).mean(0).argmax()) == item.label for item in map(dataset.item, range(128))]
    assert (found["num_correct"], found["num_records"]) == (sum(right), 128)
    assert found["accuracy"] == sum(right) / 128
    assert 0 < sum(right) < 128
    assert sum(count for _, count in found["per_class"].values()) == 128
    assert f"top_1 {sum(right) / 128:.4f} ({sum(right)} of 128 clips)" in capsys.readouterr().out


def test_a_device_that_takes_no_time_keeps_the_whole_offline_accuracy(weights: str, tmp_path: Path) -> None:
    found = evaluated([*LIVE, "--weights", weights, "--runtime-ms", "0"], tmp_path)
    assert found["scores"]["streaming"] == found["scores"]["offline"]
    assert found["scores"]["offline"]["in_time"] == 4 * FRAMES_PER_CLIP
    assert found["share_kept"] == 1.0
    assert found["is_simulated"] is True


def test_a_simulated_run_and_its_log_give_the_same_score(weights: str, tmp_path: Path) -> None:
    words = [*LIVE, "--weights", weights, "--runtime-ms", "48", "--policy", "shrinking-tail", "--out"]
    found = evaluated([*words, str(tmp_path / "one")], tmp_path)
    again = evaluated([*words, str(tmp_path / "two")], tmp_path)
    assert again["scores"] == found["scores"]
    assert (tmp_path / "one" / "answers.jsonl").read_text() == (tmp_path / "two" / "answers.jsonl").read_text()
    streaming = found["scores"]["streaming"]
    # 6/5 of a frame, shrinking-tail, a clip of 12 frames; ties count: frames 0 1 2 3 | 5 6 7 8 | 10 ...
    # used by frames 2 .. 11: 0 1 2 3 3 5 6 7 8 8
    gaps = sum(range(2, 12)) - sum((0, 1, 2, 3, 3, 5, 6, 7, 8, 8))
    assert (streaming["miss"], streaming["in_time"], streaming["mismatch"]) == (4 * 2, 0, 4 * gaps)
    answers, about = read_answers(tmp_path / "one" / "answers.jsonl")
    truths, _ = read_truth(tmp_path / "one" / "truth.jsonl")
    assert about["options"]["model"] == "timm/test_resnet"
    assert len(truths) == 4 * FRAMES_PER_CLIP
    right = 0
    for truth in truths:
        ready = [a for a in answers if a.clip == truth.clip and a.ready_seconds <= truth.pts_seconds + 1e-9]
        right += bool(ready) and ready[-1].value.top[0][0] == truth.value.label  # type: ignore[union-attr]
    assert streaming["top_1"] == right / len(truths)
    files = ["--log", str(tmp_path / "one" / "answers.jsonl"), "--truth", str(tmp_path / "one" / "truth.jsonl")]
    scored = evaluated(files, tmp_path)
    assert scored["scores"]["streaming"] == streaming
    assert evaluated([*files, "--eta", "-1"], tmp_path)["scores"]["streaming"]["miss"] == 4


def test_stages_in_parallel_are_a_pipeline(weights: str, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    RuntimeProfile(((0.03, 0.04),)).write(profile)
    words = [*LIVE, "--weights", weights, "--profile", str(profile), "--stages", "2", "--wiring"]
    alone = evaluated([*words, "sequential"], tmp_path)
    piped = evaluated([*words, "pipelined"], tmp_path)
    assert piped["circuit"] == {"num_stages": 2, "wiring": "pipelined", "latency_ticks": 1}
    assert piped["scores"]["offline"] == alone["scores"]["offline"]
    # pipelined: every frame, 1.75 frames late: always 2 behind. alone: 1.75 frames each, one after the other
    assert piped["scores"]["streaming"]["mismatch"] == 4 * 2 * (FRAMES_PER_CLIP - 2)
    assert alone["scores"]["streaming"]["mismatch"] > piped["scores"]["streaming"]["mismatch"]


def test_a_net_on_frames_is_cut_inside_and_answers_the_same(tmp_path: Path) -> None:
    torch.manual_seed(3)
    net = create_model("keypoint_cnn", num_classes=5, head="keypoints")
    weights = str(save_weights(net, tmp_path / "w.safetensors"))
    words = ["--data", "synthetic", "--model", "keypoint_cnn", "--head", "keypoints", "--weights", weights]
    words += ["--size", "64", "--num-frames", "2", "--streaming", "--max-clips", "1", "--runtime-ms", "1"]
    logs = []
    for stages in ("1", "4"):
        found = evaluated([*words, "--stages", stages, "--out", str(tmp_path / stages)], tmp_path)
        assert found["circuit"]["num_stages"] == int(stages)
        logs.append(read_answers(tmp_path / stages / "offline.jsonl")[0])
    assert len(logs[0]) == 10
    for one, four in zip(*logs, strict=True):
        assert one.frame_index == four.frame_index
        assert torch.equal(one.value.points_P2_px, four.value.points_P2_px)  # type: ignore[union-attr]
        assert torch.equal(one.value.scores_P, four.value.scores_P)  # type: ignore[union-attr]
    assert any(a.value.scores_P.abs().max() > 0 for a in logs[0])  # type: ignore[union-attr]


def test_live_on_this_machine(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = evaluated([*LIVE, "--weights", weights, "--frame-rate", "50"], tmp_path)
    assert found["is_simulated"] is False
    streaming, offline = found["scores"]["streaming"], found["scores"]["offline"]
    assert streaming["num_frames"] == offline["num_frames"] == 4 * FRAMES_PER_CLIP
    assert streaming["in_time"] == 0  # an answer takes time, and is asked for when its frame comes
    assert streaming["miss"] >= 4
    out = capsys.readouterr().out
    assert "in time" in out
    assert "streaming" in out


@pytest.mark.parametrize("is_live", [False, True])
def test_keypoints_of_the_synthetic_set(tmp_path: Path, is_live: bool) -> None:
    words = ["--data", "synthetic", "--model", "cnn_gru", "--head", "keypoints", "--weights", "random", "--size", "32"]
    live = ["--streaming", "--runtime-ms", "60", "--forecast"] if is_live else []
    found = evaluated([*words, "--num-frames", "2", "--frame-step", "1", "--max-clips", "2", *live], tmp_path)
    assert found["metric"] == "pck@0.2"
    assert len(found["scores"]["offline"]["pck@0.1_per_joint"]) == 5
    assert found["scores"]["offline"]["in_time"] == 2 * 10
    assert ("streaming, forecast" in found["scores"]) is is_live


def test_jhmdb_keypoints(data_dir: Path, tmp_path: Path) -> None:
    words = ["--data", "jhmdb", "--root", str(data_dir), "--model", "cnn_gru", "--head", "keypoints", "--size", "32"]
    words += ["--weights", "random", "--streaming", "--runtime-ms", "20", "--max-clips", "1", "--out", str(tmp_path)]
    found = evaluated(words, tmp_path)
    assert len(found["scores"]["offline"]["pck@0.2_per_joint"]) == 15
    truths, _ = read_truth(tmp_path / "truth.jsonl")
    points = torch.stack([truth.value.points_P2_px for truth in truths])  # type: ignore[union-attr]
    assert points.shape[1:] == (15, 2)
    assert bool((points.mean((0, 1)) < torch.tensor([160.0, 120.0])).all())  # in pixels of the 160 x 120 frames


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--data, --model missing; give --data and --model, or --log and --truth"),
        (["--log", "a.jsonl"], "--log and --truth belong together"),
        (["--log", "a.jsonl", "--truth", "b.jsonl"], "cannot read 'a.jsonl'"),
        (["--log", "a", "--truth", "b", "--data", "synthetic"], "--data: nothing reads it where an earlier run is sco"),
        ([*LIVE, "--weights", "random", "--frame-rate", "0"], "--frame-rate 0.0; give frames per second above 0"),
        ([*LIVE, "--weights", "random", "--runtime-ms", "5", "5", "5", "--stages", "2"], "3 stages for a circuit of 2"),
        (["--data", "synthetic", "--model", "no_such"], "unknown model 'no_such'"),
    ],
)
def test_wrong_inputs_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluate", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.count("\n") == 0


@pytest.mark.parametrize("most", [5, 128, 500])
def test_offline_clips_are_evenly_spread(most: int, weights: str, tmp_path: Path) -> None:
    found = evaluated([*SMALL, "--weights", weights, "--max-clips", str(most)], tmp_path)
    spec = model_info("timm/test_resnet").input_spec.replace(size_px=(32, 32), resize_px=None, num_frames=4)
    dataset = open_dataset("synthetic", part="test", spec=spec)
    model = create_model("timm/test_resnet", num_classes=4, weights=weights)
    chosen = [0, 25, 51, 76, 102] if most == 5 else range(128)
    with torch.no_grad():
        right = [int(model(item.clip_TCHW).mean(0).argmax()) == item.label for item in map(dataset.item, chosen)]
    assert (found["num_correct"], found["num_records"]) == (sum(right), len(right))


def test_random_weights_are_those_of_the_seed(tmp_path: Path) -> None:
    """Twice the same answers, others by another seed; the first ones are of weights that the seed made here."""
    words = ["--data", "synthetic", "--model", "keypoint_cnn", "--head", "keypoints", "--weights", "random"]
    words += ["--size", "32", "--num-frames", "2", "--max-clips", "1"]
    logs = {}
    for name, more in {"a": [], "b": [], "c": ["--seed", "1"]}.items():
        evaluated([*words, *more, "--out", str(tmp_path / name)], tmp_path)
        logs[name] = [a.value.points_P2_px for a in read_answers(tmp_path / name / "offline.jsonl")[0]]  # type: ignore
        torch.manual_seed(int(torch.randint(99, ())))  # whatever else is drawn in between
    assert all(a.equal(b) for a, b in zip(logs["a"], logs["b"], strict=True))
    assert not all(a.equal(c) for a, c in zip(logs["a"], logs["c"], strict=True))
    seed_all(0)
    weights = str(
        save_weights(create_model("keypoint_cnn", num_classes=5, head="keypoints"), tmp_path / "w.safetensors")
    )
    evaluated([*words, "--weights", weights, "--out", str(tmp_path / "d")], tmp_path)
    own = [a.value.points_P2_px for a in read_answers(tmp_path / "d" / "offline.jsonl")[0]]  # type: ignore[union-attr]
    assert all(a.equal(b) for a, b in zip(logs["a"], own, strict=True))


def test_a_log_without_an_answer_to_a_judged_frame_has_no_offline_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label = ClassLabel(1)
    truths = [FrameTruth("a", n, n / 10, label) for n in (1, 3, 5)]
    answers = [Answer("a", n, n / 10, n / 10, n / 10, Classes(((1, 1.0),))) for n in (0, 2, 4)]
    write_truth(tmp_path / "truth.jsonl", truths)
    write_answers(tmp_path / "answers.jsonl", answers)
    words = ["--log", str(tmp_path / "answers.jsonl"), "--truth", str(tmp_path / "truth.jsonl")]
    assert main(["evaluate", *words, "--json", str(tmp_path / "r.json")]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert list(found["scores"]) == ["streaming"]
    assert found["scores"]["streaming"]["top_1"] == 1.0
    assert found["share_kept"] is None
    assert "is kept" not in capsys.readouterr().out


@pytest.mark.parametrize("num_right", [1, 2])
def test_the_table_says_what_its_words_mean(num_right: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """200 frames: the first is missed, the others have the answer of 2 frames before (the second: 1 before)."""
    truths = [FrameTruth("a", n, n / 10, ClassLabel(1)) for n in range(200)]
    answers = [
        Answer("a", n, n / 10, n / 10, (max(1, n + 2) / 10 if n else 0.1), Classes(((int(n < num_right), 1.0),)))
        for n in range(200)
    ]
    write_truth(tmp_path / "truth.jsonl", truths)
    write_answers(tmp_path / "answers.jsonl", answers)
    found = evaluated(["--log", str(tmp_path / "answers.jsonl"), "--truth", str(tmp_path / "truth.jsonl")], tmp_path)
    shown = capsys.readouterr().out
    row = [cell.strip() for cell in shown.splitlines()[3].strip("|").split("|")]
    # frame 1: answer 0, 1 behind; frame 2: answer 0; frame n > 2: answer n - 2
    assert row == ["streaming", f"{(2 + (num_right > 1)) / 200:.4f}", "200", "0", "1", f"{(1 + 198 * 2) / 199:.2f}"]
    assert found["scores"]["streaming"]["mismatch"] == 1 + 198 * 2
    for word in ("in time: ", "miss: ", "behind: "):
        assert word in shown
    if num_right == 1:  # 1 of 200 offline
        assert found["share_kept"] is None
        assert "offline 0.5 %: too little to take a share of" in shown
        assert "is kept" not in shown
    else:
        assert found["share_kept"] == pytest.approx(1.5)
        assert "150.0 % of the offline figure is kept" in shown
