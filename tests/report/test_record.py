"""Files that a run leaves: whole under their name, or not at all."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sidestream.errors import WriteError
from sidestream.report import json_lines, read_json_lines, write_beside, write_text

RECORDS = [{"frame": 0, "label": "café"}, {"frame": 1, "top": [{"index": 3, "probability": 0.25}]}]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_new_file_appears_at_the_end(tmp_path):
    path = tmp_path / "answers.jsonl"
    with json_lines(path) as write:
        write(RECORDS[0])
        assert names(tmp_path) == ["answers.jsonl.part"]
        # flushed at once: another reader sees the line already
        assert json.loads((tmp_path / "answers.jsonl.part").read_text()) == RECORDS[0]
        write(RECORDS[1])
    assert names(tmp_path) == ["answers.jsonl"]
    assert [json.loads(line) for line in path.read_text().splitlines()] == RECORDS == read_json_lines(path)


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("before\n")

    def fail_halfway():
        with json_lines(path) as write:
            write(RECORDS[0])
            raise RuntimeError("stage 2 fell over")

    with pytest.raises(RuntimeError, match="stage 2"):
        fail_halfway()
    assert path.read_text() == "before\n"
    assert names(tmp_path) == ["answers.jsonl"]


def test_an_interrupt_keeps_the_lines_but_not_a_half_text(tmp_path):
    def interrupted(context):
        with context as write:
            if callable(write):
                write(RECORDS[0])
            else:
                write.write_text("half")
            raise KeyboardInterrupt

    for context in (json_lines(tmp_path / "a.jsonl"), write_beside(tmp_path / "b.txt")):
        with pytest.raises(KeyboardInterrupt):
            interrupted(context)
    assert read_json_lines(tmp_path / "a.jsonl") == RECORDS[:1]
    assert names(tmp_path) == ["a.jsonl"]


def test_appending_survives_a_killed_process(tmp_path):
    path = tmp_path / "results.jsonl"
    with json_lines(path, append=True) as write:
        write(RECORDS[0])
    code = (
        "import os, sys; from sidestream.report import json_lines\n"
        "with json_lines(sys.argv[1], append=True) as write:\n    write({'frame': 1}); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, path]).returncode == 9
    with path.open("a") as file:
        file.write('{"frame": 2, "cut o')
    assert read_json_lines(path) == [RECORDS[0], {"frame": 1}]


@pytest.mark.parametrize("record", [{"x": float("nan")}, {"x": float("inf")}, {"x": object()}])
def test_only_plain_finite_values_are_written(tmp_path, record):
    def write_it():
        with json_lines(tmp_path / "x.jsonl") as write:
            write(record)

    with pytest.raises(WriteError, match="plain, finite values"):
        write_it()
    assert names(tmp_path) == []


def test_write_text_replaces_whole(tmp_path):
    write_text(tmp_path / "t.md", "old")
    write_text(tmp_path / "t.md", "new")
    assert (tmp_path / "t.md").read_text() == "new"
    assert names(tmp_path) == ["t.md"]


@pytest.mark.parametrize("append", [False, True])
def test_a_folder_that_is_not_there_is_named(tmp_path, append):
    def write_it():
        with json_lines(tmp_path / "gone" / "x.jsonl", append=append) as write:
            write({})

    with pytest.raises(WriteError, match=r"gone/x\.jsonl.*a folder that exists"):
        write_it()


def test_a_name_that_is_taken_by_a_folder(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(WriteError, match="cannot rename"):
        write_text(tmp_path / "taken", "text")
    assert names(tmp_path) == ["taken"]
