"""``sidestream train --rule unrolled``: teacher, run, resumed, evaluated as the circuit that it was trained as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data.video_files import make_folder
from safetensors.torch import load_file

from sidestream.cli import main
from sidestream.data import open_dataset
from sidestream.engine.unroll import unroll
from sidestream.models import create_model
from sidestream.models.create import model_info
from sidestream.train.predictive import wired
from sidestream.video.prepare import prepare

MODEL, WIRING = "par_densenet_tiny", "semi-parallel:2:fresh"
SMALL = ["--model", MODEL, "--num-frames", "4", "--size", "32"]
TRAINED = [*SMALL, "--epochs", "1", "--num-workers", "0", "--batch-size", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("set"), num_clips=4))


@pytest.fixture(scope="module")
def run(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unrolled")
    assert main(["train", "--data", folder, *TRAINED, "--out", str(out / "seq")]) == 0
    words = ["--rule", "unrolled", "--wiring", WIRING, "--target", "newest", "--feedback-wire"]
    words += ["--teacher", str(out / "seq" / "last.safetensors"), "--distill", "0.1", "--lr", "0.5"]
    assert main(["train", "--data", folder, *TRAINED, *words, "--out", str(out / "run")]) == 0
    return out / "run"


def test_a_run_keeps_its_options_and_is_taken_up(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())["train"]
    wanted = {"rule": "unrolled", "wiring": WIRING, "target": "newest", "feedback_wire": True, "distill": 0.1}
    assert config.items() >= wanted.items()
    before = {key: value.clone() for key, value in load_file(run / "last.safetensors").items()}
    assert before["stages.1.feedback.weight"].abs().max() > 0
    assert main(["train", "--resume", str(run)]) == 0
    after = load_file(run / "last.safetensors")
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)


def test_it_is_evaluated_as_the_circuit_and_as_the_net(run: Path, folder: str, tmp_path: Path) -> None:
    weights = str(run / "last.safetensors")
    words = ["evaluate", "--data", folder, *SMALL, "--weights", weights, "--json", str(tmp_path / "found.json")]
    live = ["--streaming", "--wiring", WIRING, "--predictive", "--runtime-ms", *["0"] * 8]
    assert main([*words, *live]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    wiring = "semi-parallel(2), fresh skips, feedback"
    assert found["circuit"] == {"num_stages": 8, "wiring": wiring, "latency_ticks": 1}
    spec = model_info(MODEL).input_spec.replace(size_px=(32, 32), resize_px=None, num_frames=4)
    frame_spec = spec.replace(layout="BCHW", num_frames=1, min_frames=None)
    dataset = open_dataset(folder, part="test", spec=spec)
    net: Any = create_model(MODEL, num_classes=2, weights=weights)
    assert net.has_feedback
    offline = live_right = num_frames = num_answers = 0
    with torch.no_grad():
        for number, record in enumerate(dataset.records):
            item = dataset.item(number)
            offline += int(net(item.clip_TCHW[None]).argmax()) == item.label
            clip = torch.stack([prepare(frame, frame_spec) for frame in dataset.frames(record)], 1)
            circuit = wired(net, clip[:, 0], WIRING)
            made = unroll(circuit, clip, drain=False)
            assert made.ticks[0] == 1
            kept = ~torch.tensor(made.is_warm_up)
            live_right += int((made.answers[0].argmax(1) == record.label)[kept].sum())
            num_answers += int(kept.sum())
            num_frames += clip.shape[1]
    scores = found["scores"]["offline"]  # of a run that takes no time
    assert (scores["num_frames"], scores["miss"]) == (num_frames, num_frames - num_answers)
    assert scores["top_1"] == pytest.approx(live_right / num_frames)
    assert 0 < live_right < num_frames
    assert main(words) == 0
    plain = json.loads((tmp_path / "found.json").read_text())
    assert (plain["num_correct"], plain["num_records"]) == (offline, len(dataset.records))
