"""The learning rate, against PyTorch's own schedulers."""

from __future__ import annotations

import pytest
import torch

from sidestream.train.schedule import learning_rate


def test_cosine_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=17)
    for update in range(17):
        rate = learning_rate(update, base=0.3, num_updates=17, num_warmup=0)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_warm_up_is_a_straight_line_to_the_base() -> None:
    rates = [learning_rate(n, base=1.0, num_updates=10, num_warmup=4, schedule="constant") for n in range(10)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert learning_rate(4, base=1.0, num_updates=10, num_warmup=4) == 1.0
    assert learning_rate(7, base=1.0, num_updates=10, num_warmup=4) == pytest.approx(0.5)
