"""Chains and lifted modules: clip form == step form, cut between layers with their state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract import assert_equal, check_wiring
from sidestream.circuit.cut import cut
from sidestream.circuit.wiring import pipelined
from sidestream.engine.run import run
from sidestream.errors import CutError, LayoutError, ModelError
from sidestream.nn.combine import Chain, Parallel, PerFrame, Residual
from sidestream.nn.conv3d import CausalConv3d, Conv3d
from sidestream.nn.pool import MaxPool3d, Newest
from sidestream.nn.shift import OnlineShift, TemporalShift
from sidestream.nn.steppable import Steppable, step_through
from sidestream.types import NOTHING


def make_chain() -> Chain:
    torch.manual_seed(0)
    return Chain(
        PerFrame(nn.Conv2d(3, 16, 3, padding=1)),
        Chain(OnlineShift(), PerFrame(nn.Conv2d(16, 16, 3, padding=1)), PerFrame(nn.ReLU(inplace=True))),
        OnlineShift(0.25),
        PerFrame(nn.Conv2d(16, 8, 3, padding=1)),
        PerFrame(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))),
    ).eval()


LAYERS: list[Any] = [
    pytest.param(make_chain, id="chain"),
    pytest.param(lambda: Chain(PerFrame(nn.Conv2d(3, 4, 1)), PerFrame(nn.ReLU())), id="memoryless chain"),
    pytest.param(lambda: PerFrame(nn.Conv2d(3, 4, 3)), id="per frame"),
    pytest.param(lambda: OnlineShift(0.5), id="shift"),
    pytest.param(lambda: OnlineShift(0.0), id="shift nothing"),
]


def clip(num_frames: int = 6, seed: int = 3) -> Tensor:
    return torch.rand(2, num_frames, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("make", LAYERS)
def test_clip_form_equals_step_form_in_value_and_gradient(make: Any) -> None:
    torch.manual_seed(0)
    layer = make()
    results = []
    for form in (layer, lambda c: step_through(layer, c)[0]):
        clip_BTCHW = clip().requires_grad_()
        answers = form(clip_BTCHW)
        weights = torch.rand(answers.shape, generator=torch.Generator().manual_seed(5))
        gradients = torch.autograd.grad((answers * weights).sum(), [clip_BTCHW, *layer.parameters()])
        results.append((answers.detach(), *gradients))
    for by_clip, by_step in zip(*results, strict=True):
        # another batch size lets the convolution sum in another order
        torch.testing.assert_close(by_clip, by_step, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", LAYERS)
def test_no_answer_depends_on_later_frames(make: Any) -> None:
    layer, poisoned = make(), clip()
    poisoned[:, 3:] = float("nan")
    assert torch.equal(layer(poisoned)[:, :3], layer(clip())[:, :3])


@pytest.mark.parametrize("make", LAYERS)
def test_old_states_stay_valid_and_streams_resume(make: Any) -> None:
    layer = make()
    with torch.no_grad():
        whole, _ = step_through(layer, clip())
        first, middle = step_through(layer, clip()[:, :3])
        step_through(layer, clip(seed=9), middle)  # another future from the same state leaves no trace
        rest, _ = step_through(layer, clip()[:, 3:], middle)
    assert torch.equal(torch.cat([first, rest], dim=1), whole)


def test_a_step_keeps_its_frame_and_state_apart() -> None:
    layer, frame = OnlineShift(0.5), torch.ones(1, 4, 2, 2)
    _, state = layer.step(frame, layer.init_state(frame))
    frame.zero_()
    assert torch.equal(state, torch.ones(1, 2, 2, 2))


def test_shift_by_hand() -> None:
    clip_BTCHW = torch.arange(1.0, 9.0).reshape(1, 2, 4, 1, 1)
    expected = torch.tensor([[0.0, 2, 3, 4], [1, 6, 7, 8]]).reshape(1, 2, 4, 1, 1)
    assert torch.equal(OnlineShift(0.25)(clip_BTCHW), expected)
    with pytest.raises(ModelError, match=r"share = 2\.0 is not a share"):
        OnlineShift(2.0)


def test_delays_add_up() -> None:
    class Late(OnlineShift):
        delay_ticks = 2

    assert Chain(Late(), PerFrame(nn.ReLU()), Late()).delay_ticks == 4
    assert Chain(PerFrame(nn.ReLU())).delay_ticks == 0


def test_a_repeated_layer_has_a_state_for_each_place() -> None:
    shift = OnlineShift(0.5)
    twice = Chain(shift, shift)
    assert len(twice.layers) == len(twice.init_state(torch.rand(1, 4, 2, 2))) == 2
    clip_BTCHW = torch.rand(1, 4, 4, 2, 2)
    assert torch.equal(twice(clip_BTCHW), step_through(twice, clip_BTCHW)[0])


def test_what_has_no_step_form_is_refused() -> None:
    with pytest.raises(ModelError, match=r"layer 1 of a Chain is a ReLU, .*PerFrame"):
        Chain(PerFrame(nn.ReLU()), nn.ReLU())  # type: ignore[arg-type]


# --- chains in stages


def stream(chain: Steppable, clip_BTCHW: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(step_through(chain, clip_BTCHW)[0].unbind(1))


@pytest.mark.parametrize("num_stages", range(1, 8))
def test_a_chain_in_stages_equals_its_step_form(num_stages: int) -> None:
    chain, state = make_chain(), None
    stages = cut(chain, clip()[:, 0], num_stages=num_stages, costs="uniform", name="shifts")
    assert (len(stages), stages.name) == (num_stages, "shifts")
    state = stages.init_state()
    for frame, expected in zip(clip().unbind(1), stream(chain, clip()), strict=True):
        kept, before = frame.clone(), state
        old_answer, _ = stages.step(state, frame)
        answer, state = stages.step(state, frame)
        assert_equal(answer, expected)
        assert_equal(answer, old_answer)
        assert torch.equal(frame, kept)
        assert before is not state
    assert {id(p) for s in stages for p in s.module.parameters()} == {id(p) for p in chain.parameters()}


def test_only_stages_with_memory_are_stateful() -> None:
    stages = cut(make_chain(), clip()[:, 0], cut=("1", "1.1", "2", "3"))
    assert [s.name for s in stages] == ["0", "1.0", "1.1-1.2", "2", "3-4"]
    assert [s.is_stateful for s in stages] == [False, True, False, True, False]
    assert all(s.cost_seconds is not None and s.cost_seconds > 0 for s in stages)
    assert stages.is_stateful


def test_a_pipelined_chain_equals_the_sequential_one() -> None:
    stages = cut(make_chain(), clip()[:, 0], num_stages=4, costs="parameters")
    check_wiring(pipelined(stages), stages, list(clip(9).unbind(1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_stages": 9, "costs": "uniform"}, "has 7 places .* too few for num_stages = 9"),
        ({"num_stages": 99}, "has 10 places .* too few for num_stages = 99"),
        ({"cut": ("7",)}, "no module '7'; the nearest names are"),
        ({"cut": ("2", "1.1")}, "no stage can begin at '1.1': it runs before '2'"),
        ({"costs": "flops"}, "costs='flops' is unknown for a Chain"),
        ({"costs": [1.0]}, "1 costs were given for 7 layers"),
    ],
)
def test_wrong_requests(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CutError, match=message):
        cut(make_chain(), clip()[:, 0], **options)


def test_chain_inputs_are_checked() -> None:
    with pytest.raises(CutError, match="one frame as the example"):
        cut(make_chain(), (clip(), clip()))
    stages = cut(make_chain(), clip()[:, 0], num_stages=2, costs="uniform")
    with pytest.raises(LayoutError, match=r"shape \(2, 3, 9, 9\).*cut for \(2, 3, 8, 8\)"):
        stages(torch.rand(2, 3, 9, 9))


def test_cutting_leaves_the_modes_of_layers_alone() -> None:
    chain = make_chain()
    chain.layers[0].train()
    modes = [m.training for m in chain.modules()]
    cut(chain, clip()[:, 0], num_stages=3, costs="uniform")
    assert [m.training for m in chain.modules()] == modes


# --- delays, skips, and layers that swallow frames


def test_delays_behind_a_stride_count_in_the_ticks_that_get_there() -> None:
    pool, late = MaxPool3d((2, 1, 1), stride=(3, 1, 1)), TemporalShift()
    assert (Chain(pool, late).delay_ticks, Chain(pool, late).period_ticks) == (1 + 3 * 1, 3)
    assert (Chain(late, pool).delay_ticks, Chain(late, pool).period_ticks) == (1 + 1, 3)
    assert Chain(pool, pool, late).delay_ticks == 1 + 3 * 1 + 9 * 1


def test_a_skip_is_delayed_to_match_its_body() -> None:
    """Each frame is added to the shift of itself, not of the newest: by hand, on counting frames."""
    clip_BTCHW = torch.arange(1.0, 11.0).reshape(1, 5, 2, 1, 1)
    layer = Residual(TemporalShift(2))  # channel 0 from the next frame, channel 1 from the previous one
    expected = [[1 + 3, 2 + 0], [3 + 5, 4 + 2], [5 + 7, 6 + 4], [7 + 9, 8 + 6], [9 + 0, 10 + 8]]
    answers, state = step_through(layer, clip_BTCHW)
    assert answers.flatten(2).tolist() == [expected[:4]]
    assert layer.finish(state)[0].flatten().tolist() == expected[4]
    assert layer(clip_BTCHW).flatten(2).tolist() == [expected]


def test_branches_wait_for_the_longest_delay() -> None:
    layer = Parallel(Newest(), TemporalShift(4), Chain(TemporalShift(4), TemporalShift(4)), combine="concat")
    clip_BTCHW = torch.rand(2, 6, 8, 2, 2)
    assert layer.delay_ticks == 2
    expected = torch.cat([branch(clip_BTCHW) for branch in layer.branches], dim=2)
    assert torch.equal(step_through(layer, clip_BTCHW)[0], expected[:, :-2])
    assert torch.equal(step_through(layer, clip_BTCHW, and_finish=True)[0], expected)


def test_branches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match=r"every 2 ticks, its skip path every tick; give shortcut=Newest\(2\)"):
        Residual(MaxPool3d(2))
    with pytest.raises(ModelError, match=r"answer every \[1, 2\] ticks"):
        Parallel(Newest(), Newest(2))
    with pytest.raises(ModelError, match="combine = 'mean' is unknown"):
        Parallel(Newest(), combine="mean")
    with pytest.raises(LayoutError, match=r"shapes .* cannot be joined by sum"):
        Residual(PerFrame(nn.Conv2d(3, 1, 1)))(clip())
    unpadded = Parallel(Newest(), MaxPool3d((3, 1, 1), stride=1))  # its clip form is shorter by two frames
    with pytest.raises(LayoutError, match="cannot be joined by sum"):
        unpadded(clip())
    with pytest.raises(LayoutError, match=r"the branches owe \[2, 0\] answers"):
        step_through(unpadded, clip(), and_finish=True)


def swallowing_chain() -> Chain:
    torch.manual_seed(0)
    return Chain(
        PerFrame(nn.Conv2d(3, 4, 3)),
        Conv3d(4, 4, 3, padding=1),
        CausalConv3d(4, 4, 3, stride=(2, 1, 1), padding=1),
        Residual(Conv3d(4, 4, 3, padding=1)),
        PerFrame(nn.Flatten()),
    ).eval()


@pytest.mark.parametrize("num_stages", range(1, 6))
@pytest.mark.parametrize("costs", ["uniform", "measured"])
def test_a_chain_that_swallows_frames_runs_in_stages(num_stages: int, costs: str) -> None:
    chain, frames = swallowing_chain(), list(clip(12).unbind(1))
    stages = cut(chain, frames[0], num_stages=num_stages, costs=costs)
    expected, state = [], chain.init_state(frames[0])
    for n, frame in enumerate(frames):
        with torch.no_grad():
            answer, state = chain.step(frame, state)
        expected += [] if answer is NOTHING else [(n, answer)]
    assert [n for n, _ in expected] == [3, 5, 7, 9, 11]  # delay 1 + 2 * 1, period 2
    with torch.no_grad():
        expected += [(13, answer) for answer in chain.finish(state)]
    for executor in ("inline", "threads"):
        outputs = list(run(pipelined(stages), frames, executor=executor))
        assert [o.frame_index for o in outputs] == [n - 3 for n, _ in expected] == [0, 2, 4, 6, 8, 10]
        for output, (_, answer) in zip(outputs, expected, strict=True):
            assert_equal(output.value, answer)
