"""``sidestream run A B C``: the answers of each source are those of its own run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sidestream.cli import main
from sidestream.cli.run_many import named_sources, video_names
from sidestream.errors import InputError, SourceError

A = "synthetic:seconds=0.6,fps=20,size=64x64"
B = "synthetic:seconds=0.4,fps=20,size=64x64,seed=3"
C = "synthetic:seconds=0.5,fps=20,size=48x64,seed=5"
TINY = ["--model", "timm/test_efficientnet", "--weights", "random"]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(record: dict[str, Any]) -> Any:
    best = record["top"][0]
    return record["frame"], record["pts_seconds"], best["index"], pytest.approx(best["logit"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("timm/test_efficientnet", ["--stages", "2"]),
        ("simple_cnn_tsm_online", ["--stages", "2", "--threads", "3"]),
        ("simple_cnn_tsm_online", ["--executor", "inline"]),
        ("simple_cnn_tsm_online", ["--backend", "onnxruntime"]),
        ("simple_cnn_tsm_online", ["--backend", "openvino"]),
    ],
)
def test_each_source_is_answered_as_by_itself(model: str, flags: list[str], tmp_path: Path) -> None:
    if "--backend" in flags:
        pytest.importorskip(flags[1])
    which, weights = ["--model", model], tmp_path / "w.safetensors"
    import torch

    from sidestream.models import create_model
    from sidestream.models.weights import save_weights

    torch.manual_seed(0)
    save_weights(create_model(model), weights)
    which += ["--weights", str(weights)]
    assert main(["run", A, B, C, *which, *flags, "--json", str(tmp_path / "all.jsonl")]) == 0
    together = records(tmp_path / "all.jsonl")
    assert {r["source"] for r in together} == {A, B, C}
    for n, source in enumerate((A, B, C)):
        path = tmp_path / f"{n}.jsonl"
        assert main(["run", source, *which, "--stages", "1", "--executor", "inline", "--json", str(path)]) == 0
        own = [r for r in together if r["source"] == source]
        assert [said(r) for r in records(path)] == [said(r) for r in own]


def test_videos_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sidestream.video import read

    out = tmp_path / "videos"
    assert main(["run", A, B, *TINY, "--out", str(out)]) == 0
    assert [p.name for p in sorted(out.iterdir())] == ["01-synthetic.mp4", "02-synthetic.mp4"]
    assert [read(p).num_frames for p in sorted(out.iterdir())] == [12, 8]
    shown = "".join(capsys.readouterr().out.split())
    assert "12/12/0" in shown
    assert "8/8/0" in shown


def test_a_list_of_sources(tmp_path: Path) -> None:
    listed = tmp_path / "cameras.txt"
    listed.write_text(f"# two cameras\n{A}\n\n  {B}  \n")
    assert named_sources([f"@{listed}", C]) == (A, B, C)
    assert main(["run", f"@{listed}", *TINY, "--json", str(tmp_path / "a.jsonl")]) == 0
    assert len(records(tmp_path / "a.jsonl")) == 20
    assert [p.name for p in video_names(tmp_path, ["rtsp://u:p@host/door?x=1", "a b/c.mp4"])] == [
        "01-door.mp4",
        "02-c.mp4",
    ]


def test_a_source_that_breaks_off_ends_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sidestream.video.sources import FolderSource

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for n in range(6):
        Image.new("RGB", (64, 64), (n * 40, 0, 0)).save(pictures / f"{n}.png")
    whole = FolderSource.frames

    def broken(self: FolderSource) -> Iterator[Any]:
        yield from itertools.islice(whole(self), 3)
        raise SourceError("the disk is gone")

    monkeypatch.setattr(FolderSource, "frames", broken)
    out = ["--json", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "videos")]
    code = main(["run", A, str(pictures), *TINY, *out])
    found = records(tmp_path / "a.jsonl")
    assert [r["frame"] for r in found if r["source"] == A] == list(range(12))
    assert [r["frame"] for r in found if r["source"] == str(pictures)] == [0, 1, 2]
    assert code == 1
    assert "ended early: the disk is gone" in " ".join(capsys.readouterr().out.split())
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 2


def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("# none\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00\x01")
    for words, wanted in [
        ([A, A], "given twice"),
        ([f"@{tmp_path / 'empty.txt'}"], "names no source"),
        ([f"@{tmp_path / 'bytes.txt'}"], "cannot be read"),
        ([f"@{tmp_path / 'none.txt'}"], "cannot be read"),
        ([A, str(tmp_path / "none.mp4")], "none.mp4"),
        ([A, B, "--executor", "frame-parallel"], "runs one source"),
        ([A, B, "--out", str(tmp_path / "empty.txt")], "folder"),
    ]:
        assert main(["run", *words, *TINY]) == 2, words
        assert wanted in " ".join(capsys.readouterr().err.split())
    with pytest.raises(InputError, match="no source"):
        named_sources([])
    assert main(["run", *TINY]) == 2
