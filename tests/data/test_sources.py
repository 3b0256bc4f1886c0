"""Folders and manifests: classes, parts, and clear errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from data.video_files import make_video

from sidestream.data import open_dataset
from sidestream.data.sources import csv_records, folder_records
from sidestream.errors import InputError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def test_a_folder_of_classes_holds_out_a_fifth_of_each(tmp_path: Path) -> None:
    folder = touch(tmp_path, *(f"b/{n}.mp4" for n in range(20)), *(f"a/deep/{n}.AVI" for n in range(10)))
    touch(folder, "a/x.txt", "a/.hidden.mp4", ".cache/y.mp4")
    parts, classes = folder_records(folder)
    assert classes == ["a", "b"]
    counts = {part: [sum(r.label == n for r in records) for n in (0, 1)] for part, records in parts.items()}
    assert counts == {"train": [8, 16], "test": [2, 4]}
    assert not {r.key for r in parts["train"]} & {r.key for r in parts["test"]}
    touch(folder, "b/new.mp4")
    moved = {r.key for r in folder_records(folder)[0]["train"]} & {r.key for r in parts["test"]}
    assert len(moved) <= 1  # the rest keep their part when a clip joins


def test_a_folder_with_its_own_parts(tmp_path: Path) -> None:
    folder = touch(tmp_path, "train/run/1.mp4", "train/walk/2.mp4", "val/walk/3.mp4")
    parts, classes = folder_records(folder)
    assert classes == ["run", "walk"]
    assert [(r.key, r.label) for r in parts["train"]] == [("train/run/1.mp4", 0), ("train/walk/2.mp4", 1)]
    assert [(r.key, r.label) for r in parts["test"]] == [("val/walk/3.mp4", 1)]


def test_a_folder_without_videos(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no video in class-named folders; expected .*/CLASS/clip\.mp4"):
        folder_records(touch(tmp_path, "a/readme.txt", "b.mp4"))


def test_a_manifest(tmp_path: Path) -> None:
    make_video(tmp_path / "clips/one.mp4", num_frames=20)
    file = tmp_path / "list.csv"
    file.write_text(
        "path,label,start_seconds,end_seconds,split\n"
        "clips/one.mp4,walk,,,train\nclips/one.mp4,jump,0.2,0.6,train\nclips/one.mp4,walk,0.4,,val\n"
    )
    data = open_dataset(file)
    assert data.class_names == ("jump", "walk")
    assert [(r.label, r.start_seconds, r.end_seconds) for r in data.records] == [(1, None, None), (0, 0.2, 0.6)]
    assert [r.key for r in data.records] == ["clips/one.mp4", "clips/one.mp4@0.2-0.6"]
    assert min(data[1].pts_seconds) >= 0.2
    assert max(data[1].pts_seconds) < 0.6
    test = open_dataset(file, part="test")
    assert test.class_names == data.class_names
    assert 0.4 <= min(test[0].pts_seconds) < max(test[0].pts_seconds) <= 0.76


def test_labels_as_numbers(tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_text("path,label,split\na.mp4,2,train\nb.mp4,0,test\n")
    parts, classes = csv_records(file)
    assert len(classes) == 3
    assert parts["train"][0].label == 2
    assert len(csv_records(file, num_classes=7)[1]) == 7
    with pytest.raises(InputError, match="line 2: label 2 is outside 0 to 1"):
        csv_records(file, num_classes=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it has no lines"),
        ("file,label\na,b\n", "its columns are file, label; expected path,label"),
        ("path,label\na.mp4,\n", "line 2: path='a.mp4', label=''; give both"),
        ("path,label\na.mp4,-1\n", "line 2: label -1 is outside"),
        ("path,label,start_seconds\na.mp4,x,soon\n", "a.mp4: could not convert string to float: 'soon'"),
        ("path,label,split\na.mp4,x,dev\n", "line 2: split is 'dev'; expected train or test"),
    ],
)
def test_wrong_manifests(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "list.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        csv_records(file)


def test_unknown_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"unknown data 'ucf'.*the names are jhmdb, weizmann, synthetic"):
        open_dataset("ucf")
    monkeypatch.delenv("SIDESTREAM_DATA", raising=False)
    with pytest.raises(InputError, match=r"where is 'jhmdb'\? Give the folder .* as root, or set SIDESTREAM_DATA"):
        open_dataset("jhmdb")
    with pytest.raises(InputError, match=r"there is no folder .*jhmdb'; give the one that holds 'jhmdb' as root.*http"):
        open_dataset("jhmdb", root=tmp_path)
    with pytest.raises(InputError, match="only jhmdb, weizmann have splits by name"):
        open_dataset(tmp_path, split=1)
