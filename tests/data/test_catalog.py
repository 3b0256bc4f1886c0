"""The named data sets on the real files: official splits, clip times, pixels."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from sidestream.data import open_dataset
from sidestream.data.dataset import PLAIN
from sidestream.errors import InputError
from sidestream.types import Clip
from sidestream.video import prepare, read


@pytest.fixture(scope="module")
def jhmdb(data_dir: Path) -> Path:
    if not (data_dir / "jhmdb").is_dir():
        pytest.skip("no JHMDB")
    return data_dir / "jhmdb"


@pytest.fixture(scope="module")
def weizmann(data_dir: Path) -> Path:
    if not (data_dir / "weizmann").is_dir():
        pytest.skip("no Weizmann")
    return data_dir / "weizmann"


@pytest.mark.parametrize("split", [1, 2, 3])
def test_jhmdb_parts_are_those_of_the_official_lists(jhmdb: Path, split: int) -> None:
    for part, number in (("train", "1"), ("test", "2")):
        wanted = {
            (file.name.split("_test_split")[0], line.split(".avi ")[0])
            for file in (jhmdb / "splits").glob(f"*_test_split{split}.txt")
            for line in file.read_text().splitlines()
            if line.strip().endswith(f" {number}")
        }
        data = open_dataset("jhmdb", part=part, split=split, root=jhmdb.parent)
        assert len(data) == len(data.records) == len(wanted)
        assert {(data.class_names[r.label], Path(r.path).stem) for r in data.records} == wanted
        assert all(Path(record.path).is_file() for record in data.records)
        assert data.num_classes == 21


def test_jhmdb_parts_agree_with_the_index(jhmdb: Path) -> None:
    index = json.loads((jhmdb / "index.json").read_text())
    assert len(index) == 928
    for split in ("1", "2", "3"):
        for part in ("train", "test"):
            wanted = {key for key, entry in index.items() if entry[f"split{split}"] == part}
            data = open_dataset("jhmdb", part=part, split=split, root=jhmdb.parent)
            assert {record.key for record in data.records} == wanted


def test_jhmdb_clips_are_frames_of_the_file_at_their_times(jhmdb: Path) -> None:
    index = json.loads((jhmdb / "index.json").read_text())
    spec = PLAIN.replace(num_frames=5, frame_step=3)
    train, test = (open_dataset("jhmdb", part=part, root=jhmdb.parent, spec=spec) for part in ("train", "test"))
    for data in (train, test):
        for n in range(0, len(data), 97):
            item, clip = data[n], read(data.records[n].path)
            assert clip.num_frames == index[item.key]["frames"]
            chosen = [clip.pts_seconds.index(t) for t in item.pts_seconds]
            assert {b - a for a, b in pairwise(chosen)} == {3}
            assert item.clip_TCHW.equal(prepare(Clip(clip.rgb_THWC[chosen], item.pts_seconds), spec)[0])
            assert data.class_names[item.label] == index[item.key]["class"]


def test_weizmann_leaves_actors_out(weizmann: Path) -> None:
    index = json.loads((weizmann / "index.json").read_text())
    for held_out, count in (("daria", 10), ("eli, moshe", 20)):
        names = {name.strip() for name in held_out.split(",")}
        parts = {p: open_dataset("weizmann", part=p, split=held_out, root=weizmann.parent) for p in ("train", "test")}
        assert (len(parts["train"]), len(parts["test"])) == (90 - count, count)
        for part, data in parts.items():
            for record in data.records:
                entry = index[str(Path(record.path).relative_to(weizmann))]
                assert entry["class"] == data.class_names[record.label]
                assert (entry["actor"] in names) == (part == "test")
        assert parts["test"][0].clip_TCHW.shape == (8, 3, 64, 64)


def test_splits_that_do_not_exist(jhmdb: Path, weizmann: Path) -> None:
    with pytest.raises(InputError, match="no split '4'; give one of 1, 2, 3"):
        open_dataset("jhmdb", split=4, root=jhmdb.parent)
    for split in (None, "nobody"):
        with pytest.raises(InputError, match="there are daria, denis, eli"):
            open_dataset("weizmann", split=split, root=weizmann.parent)
