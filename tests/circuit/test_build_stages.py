"""Stages made by hand equal the modules called by hand, with and without skips; what does not fit is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contract import assert_equal, check_executor, check_wiring
from sidestream.circuit.build_stages import stage_of, stages_of, widened
from sidestream.circuit.wiring import pipelined
from sidestream.errors import CutError
from sidestream.nn.combine import PerFrame

FRAME = torch.zeros(1, 3, 8, 8)


def convolutions(*channels: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU()) for a, b in itertools.pairwise(channels)]


def frames(num_frames: int = 5) -> list[Tensor]:
    return list(torch.randn(num_frames, 1, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def test_a_row_is_the_modules_in_a_row() -> None:
    modules = [*convolutions(3, 4, 5), nn.Flatten(), nn.Linear(320, 2)]
    stages = stages_of(modules, FRAME, names=["a", "b", "c", "d"])
    assert [stage.name for stage in stages] == ["a", "b", "c", "d"]
    for frame in frames():
        assert_equal(stages(frame), nn.Sequential(*modules)(frame))
    check_wiring(pipelined(stages), stages, frames())
    check_executor("threads", pipelined(stages), frames())


def test_skips_that_are_added() -> None:
    a, b, c, d = modules = convolutions(3, 4, 4, 4, 4)
    stages = stages_of(modules, FRAME, skips="add")
    for frame in frames():
        one = a(frame)
        two = b(one)
        three = c(two + one)
        assert_equal(stages(frame), d(three + two))


def test_skips_that_are_concatenated_shrink_to_the_trunk() -> None:
    a, b, c, d = modules = convolutions(3, 4, 5, 6, 7)
    modules[1] = b = nn.Sequential(b, nn.MaxPool2d(2))
    widened(c, 4)
    widened(d, 5)
    stages = stages_of(modules, FRAME, skips="concat")
    for frame in frames():
        one = a(frame)
        two = b(one)
        three = c(torch.cat([two, F.avg_pool2d(one, 2)], 1))
        assert_equal(stages(frame), d(torch.cat([three, two], 1)))


def test_skips_that_are_projected_where_channels_differ() -> None:
    a, b, c, d = modules = [*convolutions(3, 4, 4, 6), nn.Sequential(nn.Flatten(), nn.Linear(384, 2))]
    stages = stages_of(modules, FRAME, skips="projection")
    weights = [dict(stage.module.named_parameters()).get("projection.weight") for stage in stages]
    assert [None if w is None else tuple(w.shape) for w in weights] == [None, None, None, (6, 4, 1, 1)]
    for frame in frames():
        one = a(frame)
        two = b(one)
        three = c(two + one)
        assert_equal(stages(frame), d(three + F.conv2d(two, weights[3])))


def test_a_skip_into_a_vector_is_pooled_to_one_pixel() -> None:
    """The trunk's channels are the flattened features; the skip's mean over pixels is projected to them."""
    modules = [*convolutions(3, 4), nn.Flatten(), nn.Linear(256, 2)]
    stages = stages_of(modules, FRAME, skips="projection")
    weight = stages[2].module.projection.weight
    for frame in frames():
        one = modules[0](frame)
        expected = modules[2](one.flatten(1) + one.mean((2, 3)) @ weight.T)
        torch.testing.assert_close(stages(frame), expected)


def test_widened_keeps_what_was_there() -> None:
    for layer, x in [
        (nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), torch.randn(2, 3, 8, 8)),
        (nn.Linear(6, 4), torch.randn(2, 6)),
    ]:
        expected = layer(x)
        wide = widened(layer, 2)
        more = torch.zeros(2, 2, *x.shape[2:])
        torch.testing.assert_close(wide(torch.cat([x, more], 1)), expected)
        assert not torch.equal(wide(torch.cat([x, more + 1], 1)), expected)
        inside = nn.Sequential(nn.Identity(), layer)
        assert widened(inside, 2) is inside
        torch.testing.assert_close(inside(torch.cat([x, more], 1)), expected)


def test_trying_teaches_nothing_and_keeps_the_mode() -> None:
    norm = nn.BatchNorm2d(3)
    dropout = nn.Dropout(0.5).eval()
    stages = stages_of([norm, dropout], FRAME)
    assert norm.num_batches_tracked == 0
    assert (norm.training, dropout.training) == (True, False)
    assert [stage.hides_state for stage in stages] == [True, False]
    assert not stages_of([norm.eval()], FRAME)[0].hides_state


@pytest.mark.parametrize(
    ("modules", "options", "message"),
    [
        ([], {}, "no modules were given"),
        (convolutions(3, 4, 5, 6), {"skips": "add"}, r"stage 3 .*\(1, 5, 8, 8\) and a skip of shape \(1, 4, 8, 8\)"),
        (
            convolutions(3, 4, 5, 6),
            {"skips": "concat"},
            r"inputs of shape \(1, 5, 8, 8\), \(1, 4, 8, 8\)",
        ),
        (convolutions(3, 4, 4), {"skips": "sum"}, "expected one of none, add, concat, projection"),
        (convolutions(4, 4), {}, r"stage '1:Sequential' cannot work on inputs of shape \(1, 3, 8, 8\)"),
        ([nn.ReLU(inplace=True)], {}, "changes its input in place; use inplace=False"),
        ([PerFrame(nn.Identity())], {}, "is a streaming layer with a state"),
    ],
)
def test_what_does_not_fit_is_refused(modules: list[nn.Module], options: dict[str, str], message: str) -> None:
    with pytest.raises(CutError, match=message):
        stages_of(modules, FRAME, **options)


def test_widening_what_cannot_be_widened_is_refused() -> None:
    with pytest.raises(CutError, match="no Conv2d or Linear layer to widen by 3"):
        widened(nn.ReLU(), 3)
    with pytest.raises(CutError, match="in 2 groups cannot be widened"):
        widened(nn.Conv2d(4, 4, 1, groups=2), 3)


def test_a_stage_with_several_outputs() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x + y, x - y

    stage = stage_of(Two(), (torch.ones(2), torch.ones(2)), name="two")
    assert (stage.name, stage.num_inputs, stage.num_outputs) == ("two", 2, 2)
    assert_equal(stage.step((torch.ones(2), torch.ones(2)), None), ((torch.full((2,), 2.0), torch.zeros(2)), None))


def test_a_stage_in_train_mode_is_tried_in_eval_mode() -> None:
    """One value per channel is enough for a look at the shapes, and the look teaches no batch norm."""
    norm = nn.BatchNorm1d(4).train()
    stages = stages_of([nn.Linear(4, 4), norm], torch.rand(1, 4))
    assert norm.training
    assert int(norm.num_batches_tracked) == 0
    assert stages[1].output_bytes == (16,)
