"""Fine stages in rows: any grouping of them answers as they do, on random small chains, to the end of the stream."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from contract import assert_equal
from sidestream.circuit.cut import cut
from sidestream.circuit.group import RowStep, grouped
from sidestream.circuit.stage import Stages
from sidestream.circuit.wiring import pipelined
from sidestream.engine.run import run
from sidestream.nn.combine import Chain, Parallel, PerFrame, Residual
from sidestream.nn.conv3d import CausalConv3d, Conv3d
from sidestream.nn.pool import Newest, RunningMean
from sidestream.nn.recurrent import ConvGRU
from sidestream.nn.shift import OnlineShift
from sidestream.nn.steppable import Steppable, step_through


def conv() -> PerFrame:
    return PerFrame(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh()))


LAYERS: list[Callable[[], Steppable]] = [
    conv,
    lambda: OnlineShift(0.5),
    RunningMean,
    lambda: CausalConv3d(2, 2, 3, padding=1),
    lambda: ConvGRU(2, 2),
    lambda: Newest(2),
    lambda: CausalConv3d(2, 2, 3, stride=(2, 1, 1), padding=1),
    lambda: Conv3d(2, 2, 3, padding=1),
    lambda: Conv3d(2, 2, 3, stride=(2, 1, 1), padding=1),
    lambda: Residual(Chain(OnlineShift(0.5), conv())),
    lambda: Residual(Chain(Conv3d(2, 2, 3, padding=1), conv())),
    lambda: Parallel(Conv3d(2, 2, 3, padding=1), CausalConv3d(2, 2, 3, padding=1)),
]


def random_chain(seed: int) -> Chain:
    torch.manual_seed(seed)
    chance = random.Random(seed)
    return Chain(*(chance.choice(LAYERS)() for _ in range(chance.randint(3, 6)))).eval()


def frames(count: int, seed: int = 1) -> list[Tensor]:
    return list(torch.randn(count, 1, 2, 4, 4, generator=torch.Generator().manual_seed(seed)))


def fine_stages(chain: Chain) -> Stages:
    """As many stages as there are places, as far as one can ask for them without knowing their number."""
    return cut(chain, frames(1)[0], cut=[str(n) for n in range(1, len(chain.layers))], check="once")


def answers(stages: Stages, given: list[Tensor], executor: str = "inline") -> list[tuple[int, Tensor]]:
    return [(output.frame_index, output.value) for output in run(pipelined(stages), given, executor=executor)]


@pytest.mark.parametrize("seed", range(12))
def test_every_grouping_answers_as_the_fine_stages(seed: int) -> None:
    chain, chance = random_chain(seed), random.Random(seed)
    fine = fine_stages(chain)
    streams = [frames(count, seed=count) for count in (1, 2, 7, 13)]  # too short to be answered in time, and longer
    expected = [answers(fine, given) for given in streams]
    for given, found in zip(streams, expected, strict=True):
        with torch.no_grad():
            whole = step_through(chain, torch.stack(given, 1), and_finish=True)[0]
        assert_equal([value for _, value in found], list(whole.unbind(1)))
        assert [n for n, _ in found] == [n * chain.period_ticks for n in range(len(found))]
    for num_stages in {1, 2, len(fine) - 1}:
        starts = [0, *sorted(chance.sample(range(1, len(fine)), num_stages - 1))]
        rows = grouped(fine, starts)
        assert len(rows) == num_stages
        for stage, (start, end) in zip(rows, pairwise([*starts, len(fine)]), strict=True):
            assert stage.is_stateful == any(fine[n].is_stateful for n in range(start, end))
            assert (stage.delay_ticks, stage.period_ticks) == (fine[end - 1].delay_ticks, fine[end - 1].period_ticks)
        for executor in ("inline", "threads"):
            for given, wanted in zip(streams, expected, strict=True):
                assert_equal(answers(rows, given, executor), wanted)


@pytest.mark.parametrize("seed", range(12, 24))
def test_the_cut_by_measured_costs_groups_the_same(seed: int) -> None:
    """Graphs of several layers, cut anywhere, in rows with layers that stay whole."""
    chain = random_chain(seed)
    expected = answers(fine_stages(chain), frames(9))
    for num_stages in (1, 2, 3):
        stages = cut(chain, frames(1)[0], num_stages=num_stages, check="once")
        assert len(stages) == num_stages
        assert_equal(answers(stages, frames(9), "threads"), expected)


def test_a_run_that_ends_early_leaves_nothing_behind() -> None:
    chain = Chain(conv(), Conv3d(2, 2, 3, padding=1), OnlineShift(0.5), conv()).eval()
    (stage,) = stages = cut(chain, frames(1)[0], num_stages=1)
    assert isinstance(stage.step, RowStep)
    expected = answers(stages, frames(5))
    with run(pipelined(stages), frames(9, seed=3), executor="threads") as outputs:
        next(iter(outputs))
    assert_equal(answers(stages, frames(5)), expected)


def test_what_jumps_over_a_row_is_handed_on_from_where_it_was_made() -> None:
    """Skips over several graph nodes, some read in the row that makes them and again behind it."""

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            a = self.convs[0](x)
            b = self.convs[1](a) + x
            c = self.convs[2](b) * a
            return self.convs[3](c) + a - b

    torch.manual_seed(0)
    chain = Chain(PerFrame(Skips()), OnlineShift(0.5), PerFrame(Skips())).eval()
    fine = cut(chain, frames(1)[0], num_stages=9)
    expected = answers(fine, frames(4))
    for starts in ([0], [0, 3], [0, 1, 2, 8], [0, 4, 5], [0, 2, 6]):
        assert_equal(answers(grouped(fine, starts), frames(4)), expected)
