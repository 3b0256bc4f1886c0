"""Label files: lines or JSON, in the order of the model's outputs."""

from __future__ import annotations

import json

import pytest

from sidestream.errors import ModelError
from sidestream.models import read_labels

WANTED = ["cat", "tabby dog", "été"]

FILES = {
    "lines.txt": "cat\ntabby dog\nété\n",
    "windows.txt": "\ufeffcat\r\ntabby dog\r\nété\r\n\r\n",
    "list.json": json.dumps(WANTED),
    "object.json": json.dumps({"2": "été", "0": "cat", "1": "tabby dog"}),
    "imagenet.json": json.dumps({"0": ["n01", "cat"], "1": ["n02", "tabby dog"], "2": ["n03", "été"]}),
}


@pytest.mark.parametrize("name", FILES)
def test_all_spellings_give_the_same_labels(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name].encode())
    assert read_labels(tmp_path / name) == WANTED


def test_a_blank_line_in_the_middle_is_a_label(tmp_path):
    (tmp_path / "l.txt").write_text("a\n\nb\n")
    assert read_labels(tmp_path / "l.txt") == ["a", "", "b"]


WRONG = {
    "gap.json": (b'{"0": "a", "2": "b"}', "every index from 0"),
    "number.json": (b"17", "not a JSON list"),
    "numbers.json": (b"[1, 2]", "not a JSON list"),
    "nested.json": (b'[["a"], []]', "not a JSON list"),
    "cut.json": (b'["a", "b', "not a JSON list"),
    "empty.txt": (b"\n\n", "holds no label"),
    "binary.txt": (b"\xff\xfe\x00\x80", "not UTF-8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_named_with_its_reason(tmp_path, name):
    content, message = WRONG[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_labels(tmp_path / name)
    assert name in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(ModelError, match=r"gone\.txt.*No such file"):
        read_labels(tmp_path / "gone.txt")
