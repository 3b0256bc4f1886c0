"""``sidestream predict``: the golden answer, the plain mean of what the model says, and wrong input in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sidestream.cli import main
from sidestream.cli.predict import in_clips
from sidestream.models import create_model, i3d, input_spec_of, save_weights
from sidestream.types import InputSpec
from sidestream.video import prepare, read, write

TINY = ["--model", "timm/test_efficientnet", "--weights", "random"]
ANY_LENGTH = InputSpec(num_frames=64, min_frames=3, layout="BTCHW")


@pytest.mark.parametrize(
    ("spec", "num_frames", "lengths"),
    [
        (ANY_LENGTH, 2, []),
        (ANY_LENGTH, 3, [3]),
        (ANY_LENGTH, 8, [8]),
        (ANY_LENGTH, 9, [6, 3]),
        (ANY_LENGTH, 14, [6, 8]),
        (ANY_LENGTH, 15, [6, 6, 3]),
        (InputSpec(num_frames=4, layout="BTCHW"), 3, []),
        (InputSpec(num_frames=4, layout="BTCHW"), 11, [4, 4]),
        (InputSpec(), 3, [1, 1, 1]),
    ],
)
def test_clips_follow_each_other_and_keep_little(spec: InputSpec, num_frames: int, lengths: list[int]) -> None:
    clips = list(in_clips(range(num_frames), spec, max_frames=6))
    assert [len(c) for c in clips] == lengths
    joined = [item for clip in clips for item in clip]
    assert joined == list(range(len(joined)))
    assert len(joined) == num_frames or spec.min_frames is None or not clips


def test_the_golden_clip(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = data_dir / "i3d_kinetics400", tmp_path / "out.json"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    gif, weights = folder / "v_CricketShot_g04_c01_rgb.gif", folder / "i3d_rgb_kinetics400_piergiaj_keys.pt"
    labels = folder / "label_map_k400.txt"
    flags = ["--model", "i3d", "--weights", str(weights), "--labels", str(labels), "--top-k", "4", "--json", str(out)]
    assert main(["predict", str(gif), *flags]) == 0
    record = json.loads(out.read_text())
    golden = np.load(folder / "golden_cricket_gif_logits.npy").reshape(-1)
    order = golden.argsort()[::-1][:4]
    names = labels.read_text().splitlines()
    assert [t["index"] for t in record["top"]] == order.tolist()
    assert [t["label"] for t in record["top"]] == [names[i] for i in order]
    assert [t["logit"] for t in record["top"]] == pytest.approx(golden[order].tolist(), abs=1e-3)
    assert record["top"][0]["label"] == "playing cricket"
    assert record["top"][0]["probability"] == pytest.approx(0.98856, abs=1e-4)
    assert (record["clips"], record["frames"], record["frames_read"]) == (1, 79, 79)
    assert record["how"] == "one clip of 79 frames"
    assert "playing cricket" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """46 frames that change."""
    folder = tmp_path / "source"
    folder.mkdir()
    path = folder / "v.mp4"
    generator = torch.Generator().manual_seed(1)
    ramp_T = torch.linspace(0, 200, 46)
    noise_THWC = torch.randint(0, 50, (46, 48, 64, 3), generator=generator)
    write(path, (ramp_T[:, None, None, None] + noise_THWC).to(torch.uint8), frame_rate=25)
    return path


def predicted(source: Path, out: Path, *flags: str) -> dict[str, Any]:
    torch.manual_seed(5)  # random weights come from here
    assert main(["predict", str(source), "--weights", "random", "--json", str(out), "--top-k", "3", *flags]) == 0
    return json.loads(out.read_text())


def check_top(record: dict[str, Any], logits_N: Tensor) -> None:
    order = logits_N.argsort(descending=True)[:3]
    assert [t["index"] for t in record["top"]] == order.tolist()
    assert [t["logit"] for t in record["top"]] == pytest.approx(logits_N[order].tolist(), rel=1e-4, abs=1e-5)
    expected = logits_N.softmax(0)[order].tolist()
    assert [t["probability"] for t in record["top"]] == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_a_frame_model_answers_with_the_mean_over_the_frames(video: Path, tmp_path: Path) -> None:
    record = predicted(video, tmp_path / "a.json", "--model", "timm/test_efficientnet")
    torch.manual_seed(5)
    model = create_model("timm/test_efficientnet")
    frames_TCHW = prepare(read(video), input_spec_of(model))[0]
    check_top(record, model(frames_TCHW).mean(0))
    assert (record["clips"], record["frames"], record["frames_read"]) == (46, 46, 46)
    assert record["how"] == "mean of the logits of 46 frames"


@torch.no_grad()
def test_a_model_of_fixed_clips_answers_with_their_mean(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(torchvision_sampling(), "", (4, 5))  # 16 frames cost seconds: 4 of every 5th do as well
    record = predicted(video, tmp_path / "a.json", "--model", "torchvision/r3d_18")
    torch.manual_seed(5)
    model = create_model("torchvision/r3d_18")
    clip_BTCHW = prepare(read(video), input_spec_of(model))[:, ::5]
    check_top(record, (model(clip_BTCHW[:, :4]) + model(clip_BTCHW[:, 4:8]))[0] / 2)
    assert (record["clips"], record["frames"], record["frames_read"]) == (2, 46, 8)
    assert record["how"] == "mean of the logits of 2 consecutive clips of 4 frames, every 5th frame"


def torchvision_sampling() -> dict[str, Any]:
    from sidestream.models import torchvision_zoo

    return torchvision_zoo._CLIP_SAMPLING


@torch.no_grad()
def test_a_long_video_is_cut_into_clips_for_a_model_of_any_length(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(i3d, "build", lambda name, num_classes: i3d.I3D(width=1 / 16))
    monkeypatch.setattr("sidestream.cli.predict.MAX_FRAMES_PER_CLIP", 16)
    record = predicted(video, tmp_path / "a.json", "--model", "i3d")
    torch.manual_seed(5)
    model = create_model("i3d")
    clip_BTCHW = prepare(read(video), input_spec_of(model))
    parts = clip_BTCHW.split([16, 16, 14], dim=1)
    check_top(record, sum(part.shape[1] * model(part)[0] for part in parts) / 46)
    assert (record["clips"], record["frames"], record["frames_read"]) == (3, 46, 46)
    assert (
        record["how"] == "mean of the logits of 3 consecutive clips of 16, 16, 14 frames, each weighted by its frames"
    )


def test_a_folder_of_images_is_a_video(data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "davis" / "JPEGImages" / "480p" / "car-shadow"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    record = predicted(folder, tmp_path / "a.json", "--model", "timm/test_efficientnet")
    assert (record["frames"], record["source"]) == (40, str(folder))


def _bad_inputs(tmp_path: Path, video: Path) -> dict[str, tuple[list[str], str]]:
    good = str(video)
    (tmp_path / "text.mp4").write_text("this is no video\n" * 50)
    (tmp_path / "folder").mkdir()
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    wrong = tmp_path / "wrong.safetensors"
    save_weights(create_model("timm/test_resnet"), wrong)
    short = tmp_path / "short.mp4"
    write(short, torch.zeros(5, 32, 32, 3, dtype=torch.uint8), frame_rate=25)
    i3d_random = ["--model", "i3d", "--weights", "random"]
    return {
        "missing file": (["no/such.mp4", *TINY], "no/such.mp4"),
        "text renamed .mp4": ([str(tmp_path / "text.mp4"), *TINY], "text.mp4"),
        "empty folder": ([str(tmp_path / "folder"), *TINY], "folder"),
        "a camera": (["camera:0", *TINY], "camera:0 is a camera source"),
        "the synthetic source": (["synthetic", *TINY], "a synthetic source"),
        "unknown model": ([good, "--model", "i3e"], "nearest names are i3d"),
        "no default weights": ([good, "--model", "i3d"], "i3d has no default weights"),
        "missing weights": ([good, "--model", "i3d", "--weights", "no.pt"], "no.pt"),
        "weights of another model": ([good, "--model", "i3d", "--weights", str(wrong)], "do not fit I3D"),
        "too few labels": ([good, *i3d_random, "--labels", str(tmp_path / "labels.txt")], "400 classes, but 2 labels"),
        "too short for i3d": ([str(short), *i3d_random], "has 5 frames, too few for i3d: it reads clips of 9 frames"),
        "too short for r3d_18": (
            [str(short), *TINY[2:], "--model", "torchvision/r3d_18"], "every 2nd of the video; give a video"
        ),
        "no class logits": ([good, *TINY[2:], "--model", "lraspp_mobilenet_v3_large"], "wants class logits"),
        "no classes": ([good, *TINY, "--top-k", "0"], "--top-k 0"),
        "no folder to write to": ([good, *TINY, "--json", str(tmp_path / "no" / "a.json")], "a.json"),
        "a folder to write to": ([good, *TINY, "--json", str(tmp_path / "folder")], "folder"),
    }  # fmt: skip


BAD_INPUTS = [
    "missing file", "text renamed .mp4", "empty folder", "a camera", "the synthetic source", "unknown model",
    "no default weights", "missing weights", "weights of another model", "too few labels", "too short for i3d",
    "too short for r3d_18", "no class logits", "no classes", "no folder to write to", "a folder to write to",
]  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_wrong_input_gives_one_line_exit_code_2_and_no_file(
    case: str, tmp_path: Path, video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, named = _bad_inputs(tmp_path, video)[case]
    before = sorted(tmp_path.rglob("*"))
    output = [] if "--json" in flags else ["--json", str(tmp_path / "o.json")]
    assert main(["predict", *flags, *output]) == 2
    captured = capsys.readouterr()
    error = captured.err.strip()
    assert error.startswith("sidestream: ")
    assert error.count("\n") == 0
    assert named in error
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


class Broken(nn.Module):
    def forward(self, frame_BCHW: Tensor) -> Tensor:
        raise RuntimeError("made up")


class NotANumber(nn.Module):
    def forward(self, frame_BCHW: Tensor) -> Tensor:
        return torch.full((1, 1000), float("nan"))


@pytest.mark.parametrize(
    ("net", "code", "message"),
    [(Broken(), 1, "failed on clip 1, which ends at frame 1: RuntimeError: made up"), (NotANumber(), 2, "NaN")],
)
def test_a_model_that_fails_is_named_and_nothing_is_left(
    net: nn.Module, code: int, message: str, tmp_path: Path, video: Path, monkeypatch: Any, capsys: Any
) -> None:
    from sidestream.models import timm_zoo

    monkeypatch.setattr(timm_zoo, "build", lambda name, num_classes: net)
    assert main(["predict", str(video), *TINY, "--json", str(tmp_path / "o.json")]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o.json").exists()
    assert not (tmp_path / "o.json.part").exists()


def test_an_older_answer_stays_when_the_new_one_fails(tmp_path: Path, video: Path) -> None:
    out = tmp_path / "o.json"
    out.write_text("{}")
    assert main(["predict", str(video), "--model", "i3d", "--weights", "no.pt", "--json", str(out)]) == 2
    assert out.read_text() == "{}"
