"""A chain of streaming layers in stages: with and without memory, the states they begin with, refusals in time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract import assert_equal
from sidestream.circuit.cut import cut
from sidestream.errors import CutError
from sidestream.models import create_model, info_of
from sidestream.models.on_stream import net_on_stream
from sidestream.nn.combine import Chain, Parallel, PerFrame, Residual
from sidestream.nn.conv3d import Conv3d
from sidestream.nn.pool import Newest
from sidestream.nn.sliding import SlidingWindow
from sidestream.types import NOTHING


def conv(inside: int, outside: int = 0) -> PerFrame:
    return PerFrame(nn.Conv2d(inside, outside or inside, 3, padding=1))


def without_memory() -> Chain:
    """Residual and parallel layers none of which remembers anything, one inside of the other; memory at the end."""
    nested = Residual(Chain(conv(4), Parallel(conv(4), Chain(conv(4), conv(4)))))
    return Chain(conv(3, 4), Residual(conv(4)), nested, Parallel(conv(4), conv(4), combine="concat"), Newest(2))


def frames(count: int) -> list[Tensor]:
    return list(torch.randn(count, 1, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("num_stages", range(1, 6))
@torch.no_grad()
def test_stages_of_layers_without_memory(num_stages: int) -> None:
    chain = without_memory()
    stages = cut(chain, frames(1)[0], num_stages=num_stages, costs="uniform")
    assert [stage.is_stateful for stage in stages] == [False] * (num_stages - 1) + [True]
    state, row_state = chain.init_state(frames(1)[0]), stages.init_state()
    for n, frame in enumerate(frames(5)):
        expected, state = chain.step(frame, state)
        found, row_state = stages.step(row_state, frame)
        assert (found is NOTHING) == (n % 2 == 1)
        assert_equal(found, expected, f"frame {n}")


MADE_OF_OTHERS = {
    "chain": lambda: Chain(without_memory(), conv(8), Chain()),
    "residual": lambda: Residual(Chain(Conv3d(3, 4, 3, padding=1), conv(4, 3))),
    "parallel": lambda: Parallel(Conv3d(3, 4, 3, padding=1), Chain(conv(3), conv(3, 4)), combine="concat"),
}


@pytest.mark.parametrize("name", [*MADE_OF_OTHERS, "slowfast_r50", "slowfast_r50_causal"])
@torch.no_grad()
def test_start_is_the_first_state_and_what_the_next_layer_is_fed(name: str) -> None:
    frame = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    layer = MADE_OF_OTHERS[name]() if name in MADE_OF_OTHERS else net_on_stream(*_made(name))[0]
    state, blank = layer.start(frame)
    assert_equal(state, layer.init_state(frame), "state")
    assert blank.shape == layer.blank(frame).shape


def _made(name: str) -> tuple[Any, Any]:
    model = create_model(name, num_classes=3)
    return model, info_of(model)


class Mean(nn.Module):
    """A clip model without a step form."""

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return clip_BTCHW.mean((1, 3, 4))


def test_a_stream_begins_without_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain(Newest(2), SlidingWindow(Mean(), 4), PerFrame(nn.Linear(3, 2)))
    stages, expected = cut(chain, frames(1)[0], num_stages=3, costs="uniform"), chain.init_state(frames(1)[0])
    monkeypatch.setattr(Mean, "forward", None)  # fails when called
    states = stages.init_state()
    assert_equal([state[0] for state in states[:2]], list(expected[:2]), "states")
    assert states[2] is None


def test_too_many_stages_are_refused() -> None:
    chain = Chain(Newest(2), SlidingWindow(Mean(), 4), PerFrame(nn.Linear(3, 2))).eval()
    assert len(cut(chain, frames(1)[0], num_stages=4)) == 4  # frames, newest frames, mean, linear
    for costs in ("measured", "uniform"):
        with pytest.raises(CutError, match=r"has \d places where a stage can begin, too few for num_stages = 30"):
            cut(chain, frames(1)[0], num_stages=30, costs=costs)
