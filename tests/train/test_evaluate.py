"""``evaluate``: against a count by hand; clips of one record are averaged."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from train.tiny import tiny_data, tiny_net

from sidestream.data import Loader
from sidestream.train import evaluate
from sidestream.train.answering import Answering


@pytest.mark.parametrize("num_clips", [1, 3])
def test_counts_and_loss_equal_those_of_a_loop_over_records(num_clips: int) -> None:
    data = tiny_data("test", 12, num_clips=num_clips)
    net = tiny_net().eval()
    found = evaluate(Answering(net), Loader(data, batch_size=5, num_workers=1).batches(0))
    correct, losses = {n: [0, 0] for n in range(4)}, []
    with torch.no_grad():
        for number, record in enumerate(data.records):
            clips = torch.stack([data[number * num_clips + k].clip_TCHW for k in range(num_clips)])
            logits = net(clips)
            losses.append(float(F.cross_entropy(logits, torch.tensor([record.label] * num_clips))))
            correct[record.label][0] += int(logits.mean(0).argmax()) == record.label
            correct[record.label][1] += 1
    assert found.per_class == {label: tuple(counts) for label, counts in correct.items()}
    assert found.accuracy == sum(c for c, _ in correct.values()) / 12
    assert found.loss == pytest.approx(sum(losses) / 12, rel=1e-5)
