"""Records by name: stretches of one video are records of their own."""

from __future__ import annotations

import torch

from sidestream.data import Batch, ClipRecord
from sidestream.train import evaluate


def test_stretches_of_one_video_have_names_of_their_own() -> None:
    stretches = [(None, None), (0.0, 1.0), (1.0, 2.5), (1.0, None), (None, 1.5)]
    names = [ClipRecord("a.mp4", 0, start, end).name for start, end in stretches]
    assert names == ["a.mp4", "a.mp4@0-1.0", "a.mp4@1.0-2.5", "a.mp4@1.0-end", "a.mp4@0-1.5"]
    assert ClipRecord("a.mp4", 0, 1.0, 2.0, "mine").name == "mine"


def test_they_are_evaluated_apart() -> None:
    """One stretch is answered rightly, the other wrongly."""
    records = [ClipRecord("a.mp4", 0, 0.0, 1.0), ClipRecord("a.mp4", 1, 1.0, 2.0)]
    logits_BTN = torch.tensor([[[3.0, 0.0]], [[1.0, 0.0]]])
    batch = Batch(logits_BTN, torch.tensor([0, 1]), tuple(r.name for r in records), ((), ()), 0)
    found = evaluate(torch.nn.Identity(), [batch])
    assert (found.num_records, found.num_correct) == (2, 1)
    assert found.per_class == {0: (1, 1), 1: (0, 1)}
