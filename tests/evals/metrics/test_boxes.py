"""Box AP: a case counted by hand, equality with pycocotools on pictures of its own making; IoU by hand."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from sidestream.errors import InputError, MissingExtraError
from sidestream.evals.metrics import Detections, box_ap, box_iou


def detections(rows: list[tuple[float, ...]], labels: list[int], scores: list[float] | None = None) -> Detections:
    return Detections(
        torch.tensor(rows, dtype=torch.float32).reshape(-1, 4),
        torch.tensor([1.0] * len(rows) if scores is None else scores),
        torch.tensor(labels, dtype=torch.int64),
    )


def test_iou_by_hand():
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [3, 3, 3, 9]])
    expected = [[1, 1 / 3, 0, 0], [1 / 3, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert torch.allclose(box_iou(boxes, boxes), torch.tensor(expected))


def test_a_case_counted_by_hand():
    """Right at 0.9, wrong at 0.8, right at 0.7: precision 1 up to recall 1/2 (51 of 101 points), then 2/3."""
    pytest.importorskip("pycocotools")
    truth = detections([(0, 0, 50, 50), (100, 0, 150, 50)], [3, 3])
    answer = detections([(0, 0, 50, 50), (200, 0, 250, 50), (100, 0, 150, 50)], [3, 3, 3], [0.9, 0.8, 0.7])
    found = box_ap([answer], [truth])
    assert found["AP50"] == pytest.approx((51 + 50 * 2 / 3) / 101, abs=1e-9)
    assert found["AP"] == pytest.approx(found["AP50"])
    assert found["AP_medium"] == pytest.approx(found["AP50"])  # 2500 pixels each
    assert (found["AP_small"], found["AP_large"]) == (-1.0, -1.0)


def test_it_is_pycocotools(tmp_path, capsys):
    """The same boxes through files in COCO's own form."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    chance = np.random.default_rng(1)
    truths, answers = [], []
    truth_rows, answer_rows = [], []
    for image in range(12):
        corner = chance.uniform(0, 300, (5, 2))
        size = chance.uniform(8, 160, (5, 2))
        labels = chance.integers(0, 3, 5).tolist()
        boxes = np.concatenate([corner, corner + size], 1).astype(np.float32)
        shaken = (boxes + chance.normal(0, 6, boxes.shape)).astype(np.float32)
        scores = chance.uniform(0, 1, 5).astype(np.float32)
        is_seen = chance.uniform(size=5) < 0.8
        truths.append(detections(boxes.tolist(), labels))
        kept = [n for n in range(5) if is_seen[n]]
        answer = detections(shaken[kept].tolist(), [labels[n] for n in kept], scores[kept].tolist())
        answers.append(None if image == 4 else answer)
        for box, label in zip(boxes.astype(float), labels, strict=True):
            x, y, right, bottom = box.tolist()
            row = {"id": len(truth_rows) + 1, "image_id": image, "category_id": label, "iscrowd": 0}
            truth_rows.append({**row, "bbox": [x, y, right - x, bottom - y], "area": (right - x) * (bottom - y)})
        for n in kept if image != 4 else ():
            x, y, right, bottom = shaken[n].astype(float).tolist()
            row = {"image_id": image, "category_id": labels[n], "bbox": [x, y, right - x, bottom - y]}
            answer_rows.append({**row, "score": float(scores[n])})
    categories = [{"id": n, "name": str(n)} for n in range(3)]
    images = [{"id": n, "width": 500, "height": 500} for n in range(12)]
    whole = {"info": {}, "images": images, "categories": categories, "annotations": truth_rows}
    (tmp_path / "truth.json").write_text(json.dumps(whole))
    (tmp_path / "answers.json").write_text(json.dumps(answer_rows))
    truth = coco.COCO(str(tmp_path / "truth.json"))
    official = cocoeval.COCOeval(truth, truth.loadRes(str(tmp_path / "answers.json")), "bbox")
    official.evaluate()
    official.accumulate()
    official.summarize()
    capsys.readouterr()
    found = box_ap(answers, truths)
    assert list(found.values()) == official.stats[:6].tolist()
    assert 0.1 < found["AP"] < 0.9
    assert capsys.readouterr().out == ""


def test_no_answer_at_all_is_zero_and_classes_without_truth_do_not_count():
    pytest.importorskip("pycocotools")
    truth = detections([(0, 0, 50, 50)], [0])
    assert box_ap([None], [truth])["AP"] == 0.0
    other = detections([(0, 0, 50, 50), (0, 0, 50, 50)], [7, 0], [0.9, 0.1])
    assert box_ap([other], [truth])["AP"] == pytest.approx(1.0)


def test_wrong_boxes_say_what_to_give():
    pytest.importorskip("pycocotools")
    truth = detections([(0, 0, 5, 5)], [0])
    with pytest.raises(InputError, match="0 answers for 1 pictures"):
        box_ap([], [truth])
    with pytest.raises(InputError, match="no true box in any picture"):
        box_ap([None], [detections([], [])])


def test_without_pycocotools_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sidestream\[coco\]'"):
        box_ap([None], [detections([(0, 0, 5, 5)], [0])])
