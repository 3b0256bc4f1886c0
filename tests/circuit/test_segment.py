"""Runs of streaming layers as one graph: cut inside of layers, each state in one stage, weights that are replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract import assert_equal
from sidestream.circuit.blocks import blocks_of
from sidestream.circuit.calls import NOTHING_FOUND
from sidestream.circuit.cut import cut
from sidestream.circuit.group import RowStep
from sidestream.circuit.segment import PieceStep
from sidestream.circuit.stage import Stages
from sidestream.circuit.wiring import pipelined
from sidestream.engine.run import run
from sidestream.errors import CutError
from sidestream.nn.combine import Chain, PerFrame, Residual
from sidestream.nn.conv3d import CausalConv3d, Conv3d
from sidestream.nn.pool import Newest
from sidestream.nn.recurrent import ConvGRU
from sidestream.nn.shift import OnlineShift
from sidestream.nn.sliding import SlidingWindow
from sidestream.nn.steppable import step_through
from sidestream.types import NOTHING


def conv(channels: int) -> nn.Module:
    return nn.Conv2d(channels, channels, 3, padding=1)


def encoder(channels: int = 4) -> PerFrame:
    return PerFrame(nn.Sequential(conv(channels), nn.ReLU(), conv(channels), nn.ReLU(inplace=True), conv(channels)))


class ClipModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(4, 4, 3, padding=1), nn.Conv3d(4, 4, 3, padding=1)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self.second(self.first(clip_BTCHW.transpose(1, 2)).relu()).mean((2, 3, 4))


CHAINS: dict[str, Any] = {
    "encoders": lambda: Chain(encoder(), OnlineShift(0.25), encoder()),
    "residual bodies": lambda: Chain(encoder(), Residual(Chain(OnlineShift(0.5), encoder())), CausalConv3d(4, 3, 3)),
    "a cell": lambda: Chain(encoder(), ConvGRU(4, 4), encoder()),
    "behind a window": lambda: Chain(
        Newest(2), SlidingWindow(ClipModel(), 3, period_ticks=2), PerFrame(nn.Linear(4, 2))
    ),
    "around look-ahead": lambda: Chain(encoder(), Conv3d(4, 4, 3, padding=1), encoder(), Newest(2), encoder()),
}


def made(name: str) -> Chain:
    torch.manual_seed(0)
    return CHAINS[name]().eval()


def frames(count: int, seed: int = 1) -> list[Tensor]:
    return list(torch.randn(count, 1, 4, 6, 6, generator=torch.Generator().manual_seed(seed)))


def expected_of(chain: Chain, given: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return list(step_through(chain, torch.stack(given, 1), and_finish=True)[0].unbind(1))


def check_stream(stages: Stages, chain: Chain, given: list[Tensor], executor: str = "inline") -> None:
    with run(pipelined(stages), given, executor=executor) as outputs:
        found = [(output.frame_index, output.value) for output in outputs]
    expected = expected_of(chain, given)
    assert [n for n, _ in found] == [n * chain.period_ticks for n in range(len(expected))]
    for (n, value), wanted in zip(found, expected, strict=True):
        assert_equal(value, wanted, f"frame {n}")


def graphs_of(stages: Stages) -> list[Any]:
    parts = [part for s in stages for part in (s.step.parts if isinstance(s.step, RowStep) else (s,))]
    return [part for part in parts if isinstance(part.step, PieceStep)]


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
@pytest.mark.parametrize("name", CHAINS)
def test_stages_inside_of_layers_answer_as_the_chain(name: str, num_stages: int) -> None:
    chain = made(name)
    stages = cut(chain, frames(1)[0], num_stages=num_stages)
    assert len(stages) == num_stages
    assert graphs_of(stages)
    for executor in ("inline", "threads"):
        check_stream(stages, chain, frames(9), executor)
    assert {id(p) for s in stages for p in s.module.parameters()} == {id(p) for p in chain.parameters()}


def test_more_stages_than_layers() -> None:
    chain = made("encoders")
    stages = cut(chain, frames(1)[0], num_stages=8)
    check_stream(stages, chain, frames(5))
    assert sum(stage.is_stateful for stage in stages) == 1


@pytest.mark.parametrize("name", ["encoders", "residual bodies", "a cell"])
def test_a_state_stays_in_one_stage(name: str) -> None:
    """At every place where a stage can begin: a stage holds whole states of layers, and all are held once."""
    chain, frame = made(name), frames(1)[0]
    (block,) = blocks_of(chain, frame, names=None, costs="measured", found=NOTHING_FOUND)
    assert block.segment is not None
    wanted = sum(len(stage.init_state()) for stage in cut(chain, frame, num_stages=1) if stage.init_state)
    weights = [0.0] * block.num_units
    for place in sorted(set(range(1, block.num_units)) - block.forbidden):
        costs = [1.0 if n in (place - 1, place) else w for n, w in enumerate(weights)]  # an even cut is there
        stages = cut(chain, frame, num_stages=2, costs=costs, check="off")
        assert len(stages[0].unit_costs or ()) == place
        assert sum(len(stage.init_state()) for stage in stages if stage.init_state) == wanted
        check_stream(stages, chain, frames(3))
    assert block.forbidden


def test_names_of_modules_inside_of_layers() -> None:
    chain = made("residual bodies")
    names = ("0.module.2", "1", "1.paths.branches.1.1.module.4", "2")
    stages = cut(chain, frames(1)[0], cut=names)
    assert len(stages) == 5
    assert [stage.is_stateful for stage in stages] == [False, False, True, False, True]
    assert stages[0].name == "0.module.0-0.module.1"
    assert stages[4].name.startswith("2")
    check_stream(stages, chain, frames(5))
    with pytest.raises(CutError, match=r"no module '0\.module\.9'; the nearest names are"):
        cut(chain, frames(1)[0], cut=("0.module.9",))


def test_a_name_inside_of_a_layer_that_stays_whole_is_refused() -> None:
    chain = Chain(encoder(), Residual(Conv3d(4, 4, 3, padding=1)), encoder()).eval()
    with pytest.raises(
        CutError, match=r"no stage can begin at '1\.paths\.branches\.1': layer '1' \(Residual\) stays whole"
    ):
        cut(chain, frames(1)[0], cut=("1.paths.branches.1",))


def test_in_train_mode_layers_stay_whole() -> None:
    chain = made("encoders").train()
    assert not graphs_of(cut(chain, frames(1)[0], num_stages=3))
    with pytest.raises(CutError, match="has 3 places"):
        cut(chain, frames(1)[0], num_stages=4)


@pytest.mark.parametrize("how", ["in place", "replaced", "loaded"])
def test_weights_that_change_after_the_cut_are_followed(how: str) -> None:
    chain, other = made("residual bodies"), made("residual bodies")
    stages = cut(chain, frames(1)[0], num_stages=4)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
        if how == "in place":
            for mine, new in zip(chain.parameters(), other.parameters(), strict=True):
                mine.copy_(new)
        elif how == "loaded":
            chain.load_state_dict(other.state_dict(), assign=True)
        else:
            chain.layers[0].module[2].weight = nn.Parameter(torch.ones(4, 4, 3, 3))
    check_stream(stages, chain, frames(4))


def test_runs_that_end_early_leave_nothing_behind() -> None:
    chain = made("residual bodies")
    stages = cut(chain, frames(1)[0], num_stages=3)
    with run(pipelined(stages), frames(6, seed=9), executor="threads") as outputs:
        next(iter(outputs))
    check_stream(stages, chain, frames(4), "threads")


def test_an_old_state_stays_valid() -> None:
    chain = made("a cell")
    stages = cut(chain, frames(1)[0], num_stages=2)
    state = stages.init_state()
    for frame in frames(3):
        _, state = stages.step(state, frame)
    first, _ = stages.step(state, frames(1, seed=4)[0])
    stages.step(state, frames(1, seed=5)[0])
    again, _ = stages.step(state, frames(1, seed=4)[0])
    assert_equal(again, first)
    assert first is not NOTHING
