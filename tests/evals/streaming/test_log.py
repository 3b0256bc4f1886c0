"""The log: what is written is read back, to the last bit; anything else is refused with its line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from sidestream.errors import InputError, WriteError
from sidestream.evals.streaming import (
    Answer,
    Boxes,
    Classes,
    ClassLabel,
    FrameTruth,
    Masks,
    Points,
    pair,
    read_answers,
    read_truth,
    score,
    write_answers,
    write_truth,
)
from sidestream.evals.streaming.values import to_record

VALUES = [
    Classes(((3, 0.1), (0, -2.5))),
    Boxes(torch.rand(2, 4), torch.rand(2), torch.tensor([5, 1])),
    Boxes(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)),
    Points(torch.rand(15, 2) * 320, torch.rand(15)),
    Masks("masks.safetensors", "a/7"),
    ClassLabel(4),
]


def same(one: object, other: object) -> bool:
    """Equal to the bit: the tensors of a value come back with shape and type."""
    fields = list(getattr(one, "__slots__", ()))
    return type(one) is type(other) and all(
        a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in ((getattr(one, f), getattr(other, f)) for f in fields)
    )


def test_a_log_comes_back_as_it_was(tmp_path):
    answers = [Answer("clip é", n, n / 30, n / 30 + 1e-3, n / 30 + 0.1, value) for n, value in enumerate(VALUES)]
    write_answers(tmp_path / "log.jsonl", answers, about={"model": "m", "frame_rate": 30})
    found, about = read_answers(tmp_path / "log.jsonl")
    assert about == {"model": "m", "frame_rate": 30}
    assert len(found) == len(answers)
    for one, other in zip(found, answers, strict=True):
        assert (one.clip, one.frame_index, one.pts_seconds) == (other.clip, other.frame_index, other.pts_seconds)
        assert (one.arrived_seconds, one.ready_seconds) == (other.arrived_seconds, other.ready_seconds)
        assert same(one.value, other.value)
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_truth_comes_back_as_it_was(tmp_path):
    truths = [FrameTruth("a", n, n / 7, value) for n, value in enumerate(VALUES)]
    write_truth(tmp_path / "truth.jsonl", truths)
    found, about = read_truth(tmp_path / "truth.jsonl")
    assert about == {}
    assert [(t.clip, t.frame_index, t.pts_seconds) for t in found] == [("a", n, n / 7) for n in range(len(VALUES))]
    assert all(same(one.value, other.value) for one, other in zip(found, truths, strict=True))


def test_a_value_that_is_no_number_leaves_no_file(tmp_path):
    with pytest.raises(WriteError, match="plain, finite values"):
        write_answers(tmp_path / "log.jsonl", [Answer("a", 0, 0.0, 0.0, float("inf"), VALUES[0])])
    assert list(tmp_path.iterdir()) == []


GOOD = {
    "clip": "a",
    "frame": 0,
    "pts_seconds": 0.0,
    "arrived_seconds": 0.0,
    "ready_seconds": 0.1,
    "answer": to_record(VALUES[0]),
}
HEAD = json.dumps({"format": "sidestream answers", "version": 1, "about": {}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frame": -1}, "line 3: frame is -1; expected a whole number from 0 on"),
        ({"frame": 0}, "line 3: frame 0 of 'a' is there twice"),
        ({"frame": True}, "frame is True"),
        ({"clip": 3}, "clip is 3; expected a name"),
        ({"ready_seconds": -1.0}, "ready at -1.0 s, before its frame arrived at 0.0 s"),
        ({"ready_seconds": "1"}, "ready_seconds is '1'; expected seconds"),
        ({"more": 1}, "expected clip, frame"),
        ({"answer": {"kind": "smell"}}, "a value of kind 'smell'; expected one of class, classes"),
        ({"answer": {"kind": "classes"}}, "a value of kind 'classes' has the keys"),
        ({"answer": {"kind": "classes", "top": [[1]]}}, "are not rows of 2 numbers"),
        ({"answer": {"kind": "classes", "top": [["1", 0.5]]}}, "'1' is no whole number"),
        ({"answer": {"kind": "points", "points_px": [[1, 2]], "scores": []}}, "0 scores or labels for 1 boxes"),
        ({"answer": {"kind": "points", "points_px": [[1, None]], "scores": [1]}}, "None is no number"),
        ({"answer": {"kind": "boxes", "boxes_px": {}, "scores": [], "labels": []}}, "expected a list"),
        ({"answer": {"kind": "masks", "file": "", "key": "k"}}, "'' is no name"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, change, message):
    record = {**GOOD, "frame": 1, **change}
    (tmp_path / "log.jsonl").write_text("\n".join([HEAD, json.dumps(GOOD), json.dumps(record)]) + "\n")
    with pytest.raises(InputError) as caught:
        read_answers(tmp_path / "log.jsonl")
    assert "log.jsonl, line 3" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not begin as a file of sidestream answers, version 1, does"),
        (json.dumps(GOOD) + "\n", "does not begin as"),
        (HEAD.replace("answers", "truth") + "\n", "does not begin as"),
        (HEAD, "ends in the middle of a line"),
        (HEAD + "\n[1]\n", "line 2 is a list; expected an object"),
        (HEAD + "\n{\n", "line 2 is no JSON"),
        (HEAD + "\n" + json.dumps(GOOD).replace("0.1", "NaN") + "\n", "line 2 is no JSON: NaN"),
    ],
)
def test_a_file_that_is_no_log_is_refused(tmp_path, text, message):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_answers(tmp_path / "log.jsonl")


def test_masks_lie_beside_the_log_and_are_scored_from_there(tmp_path):
    truth_HW, answer_HW = torch.zeros(4, 6, dtype=torch.bool), torch.zeros(4, 6, dtype=torch.bool)
    truth_HW[:, :3], answer_HW[:, 1:4] = True, True  # 8 pixels shared of 16
    (tmp_path / "run").mkdir()
    save_file({"t": truth_HW}, tmp_path / "truth.safetensors")
    save_file({"m": answer_HW, "f": answer_HW.float()}, tmp_path / "run" / "m.safetensors")
    truths = [FrameTruth("a", n, n / 25, Masks("truth.safetensors", "t")) for n in range(4)]
    answers = [Answer("a", 0, 0.0, 0.0, 1.5 / 25, Masks("m.safetensors", "m"))]
    folders = (tmp_path, tmp_path / "run")
    assert score(pair(truths, answers), folders=folders)["mask_iou"] == pytest.approx((0.5 + 0.5) / 4)
    with pytest.raises(InputError, match="no mask 'm' in"):
        score(pair(truths, answers), folders=(tmp_path, tmp_path))
    with pytest.raises(InputError, match=r"is torch.float32 .* expected bool"):
        Masks("m.safetensors", "f").load(tmp_path / "run")
