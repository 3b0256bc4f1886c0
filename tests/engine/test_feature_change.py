"""Periods from feature change: on nets whose change is known by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.wiring import parallel, with_periods
from sidestream.engine.feature_change import choose_periods, feature_change, periods_from_change
from sidestream.engine.run import run
from sidestream.errors import InputError

CLIP = (1.1 ** torch.arange(9, dtype=torch.float64)).reshape(1, 9, 1, 1, 1).expand(2, 9, 3, 2, 2)
"""Every pixel grows by a tenth of itself from frame to frame."""


class Power(nn.Module):
    def __init__(self, exponent: float) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, x: Tensor) -> Tensor:
        return x.abs() ** self.exponent


def test_change_is_the_relative_step() -> None:
    """x, then x ** 0.5, then x ** 0.25, which grow by 1.1, 1.1 ** 0.5 and 1.1 ** 0.25 from frame to frame."""
    stages = stages_of([Power(1.0), Power(0.5), Power(0.5)], CLIP[:, 0])
    expected = [1.1**e - 1 for e in (1.0, 0.5, 0.25)]
    assert feature_change(stages, CLIP) == pytest.approx(expected, rel=1e-12)
    assert feature_change(parallel(stages), CLIP) == pytest.approx(expected, rel=1e-12)


def test_periods_of_a_net_that_slows_down() -> None:
    """Changes 0.1, 0.0488, 0.0241; with 0.2 of tolerance periods up to 3, 5 and 9."""
    stages = stages_of([Power(1.0), Power(0.5), Power(0.5)], CLIP[:, 0])
    assert periods_from_change(stages, CLIP, tolerance=0.201, max_period=16, powers_of_two=False) == (3, 5, 9)
    assert periods_from_change(stages, CLIP, tolerance=0.201, max_period=16) == (2, 4, 8)
    assert periods_from_change(stages, CLIP, tolerance=0.201, max_period=4) == (2, 4, 4)
    circuit = with_periods(parallel(stages), periods_from_change(stages, CLIP, tolerance=0.201))
    assert len(list(run(circuit, CLIP.unbind(1), executor="inline"))) == 9


def test_earlier_stages_give_way_to_a_fast_later_one() -> None:
    assert choose_periods([0.01, 0.5, 0.02], tolerance=0.1, max_period=16, powers_of_two=False) == (1, 1, 6)
    assert choose_periods([0.1, 0.04, 0.0], tolerance=0.1, powers_of_two=False) == (2, 3, 8)


@pytest.mark.parametrize("seed", range(20))
def test_periods_keep_what_the_rule_promises(seed: int) -> None:
    changes = torch.rand(6, generator=torch.Generator().manual_seed(seed)).square().tolist()
    for powers_of_two in (True, False):
        periods = choose_periods(changes, tolerance=0.3, max_period=12, powers_of_two=powers_of_two)
        assert list(periods) == sorted(periods)
        for n, period in enumerate(periods):
            assert (period - 1) * changes[n] <= 0.3 + 1e-12
            assert 1 <= period <= 12
            if powers_of_two:
                assert math.log2(period).is_integer()
        longer = 2 * periods[-1] if powers_of_two else periods[-1] + 1  # nothing holds back the last stage
        assert longer > 12 or (longer - 1) * changes[-1] > 0.3


def test_still_and_wrong_input() -> None:
    stages = stages_of([nn.Identity(), nn.Identity()], CLIP[:, 0])
    assert periods_from_change(stages, CLIP[:, :1].expand(2, 5, 3, 2, 2)) == (8, 8)
    with pytest.raises(InputError, match="longer clip"):
        periods_from_change(stages, CLIP[:, :1])
    with pytest.raises(InputError, match="tolerance"):
        choose_periods([0.1], tolerance=-1)
