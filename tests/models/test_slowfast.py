"""SlowFast and the single-pathway ResNets: streams against clips, causality, what SlowFast's answers mean, refusals.

Values against pytorchvideo are in ``tests/parity``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from contract import assert_equal, check_streaming_layer
from sidestream.circuit.cut import cut
from sidestream.circuit.wiring import pipelined
from sidestream.engine.run import run
from sidestream.errors import LayoutError, WeightsError
from sidestream.models import create_model, input_spec_of, list_models, load_weights, model_info, save_weights
from sidestream.models.heads import DenseModel
from sidestream.models.slowfast import SlowFast
from sidestream.models.slowfast_single import PLANS, SinglePathway
from sidestream.models.slowfast_stream import Join, Split
from sidestream.nn.steppable import step_through

SINGLE = ["slow_r50", "c2d_r50", "i3d_r50"]
NAMES = [f"{name}{suffix}" for name in [*SINGLE, "slowfast_r50"] for suffix in ("", "_causal")]


def randomised(net: Any) -> Any:
    """float64, weights and statistics that show every mistake."""
    chance = torch.Generator().manual_seed(3)
    net = net.double().eval()
    for name, value in net.state_dict().items():
        if value.ndim > 1:
            value.copy_(torch.randn(value.shape, generator=chance, dtype=value.dtype) * value[0].numel() ** -0.5)
        elif name.endswith(("weight", "running_var")):
            value.copy_(torch.rand(value.shape, generator=chance, dtype=value.dtype) + 0.5)
        elif value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=chance, dtype=value.dtype) * 0.2 + 0.2)
    return net


def single(kind: str, *, is_causal: bool = False, depths: tuple[int, ...] = (1, 2, 1, 2)) -> SinglePathway:
    return randomised(SinglePathway(PLANS[kind], 3, depths=depths, width=4, is_causal=is_causal))


def slowfast(*, is_causal: bool = False, alpha: int = 4) -> SlowFast:
    return randomised(SlowFast(3, depths=(1, 1, 1, 1), width=16, alpha=alpha, is_causal=is_causal))


def clip_of(num_frames: int, height: int = 32, width: int = 32) -> Tensor:
    shape = (2, num_frames, 3, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)  # float64, sums in another order


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", PLANS)
def test_single_pathways_keep_the_contract(kind: str, is_causal: bool) -> None:
    net = single(kind, is_causal=is_causal, depths=(1, 1, 1, 1))
    field = {"slow": 5, "c2d": 2, "i3d": 16}[
        kind
    ]  # i3d: 5 + 2, then pairs: + 1, then 2 * 2 for each of two convolutions
    check_streaming_layer(
        net.streaming(), clip_of(10 if kind == "i3d" else 6), is_causal=is_causal, receptive_field=field
    )


@pytest.mark.parametrize(("alpha", "num_frames"), [(4, 8), (4, 11), (2, 5)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_slowfast_keeps_the_contract(is_causal: bool, alpha: int, num_frames: int) -> None:
    stream = slowfast(is_causal=is_causal, alpha=alpha).streaming()
    assert stream.period_ticks == alpha
    check_streaming_layer(stream, clip_of(num_frames), is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", [*PLANS, "slowfast"])
@torch.no_grad()
def test_streams_give_the_answers_and_features_of_clips(kind: str, is_causal: bool) -> None:
    net: Any = slowfast(is_causal=is_causal) if kind == "slowfast" else single(kind, is_causal=is_causal)
    for clip in (clip_of(9, 40, 64), clip_of(16)):
        answers, features = net.answers(clip), net.features(clip)
        close(step_through(net.streaming(), clip, and_finish=True)[0], answers)
        close(net.streaming()(clip), answers)
        close(step_through(net.streaming_features(), clip, and_finish=True)[0], features)
        assert features.shape[2:] == (net.num_features, -(-clip.shape[3] // 32), -(-clip.shape[4] // 32))
        if clip.shape[1] == 16:
            close(answers.mean(1), net(clip))


@torch.no_grad()
def test_slowfast_answers_are_those_of_the_whole_where_lengths_divide() -> None:
    """Non-causal: an incomplete last group has a part in ``forward`` but no answer. Causal: every length agrees."""
    net, causal = slowfast(), slowfast(is_causal=True)
    assert [net.answers(clip_of(n)).shape[1] for n in (4, 7, 8, 11)] == [1, 1, 2, 2]
    assert [causal.answers(clip_of(n)).shape[1] for n in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]
    for num_frames in (1, 5, 8):
        close(causal.answers(clip_of(num_frames)).mean(1), causal(clip_of(num_frames)))
    assert not torch.allclose(net.answers(clip_of(7)).mean(1), net(clip_of(7)))


@torch.no_grad()
def test_the_slow_pathway_takes_every_alpha_th_frame() -> None:
    net, clip = slowfast(), clip_of(16)
    close(net.forward_pathways(clip[:, [0, 4, 8, 12]], clip), net(clip))
    published = net.forward_pathways(clip[:, torch.linspace(0, 15, 4).long()], clip)
    assert not torch.allclose(published, net(clip))
    message = r"given 3 slow frames and 16 fast ones; with alpha = 4 it needs 4 slow ones"
    with pytest.raises(LayoutError, match=message):
        net.forward_pathways(clip[:, :3], clip)


def test_what_travels_between_split_and_join() -> None:
    split, clip = Split(3), clip_of(4, 2, 2)
    state, seen = split.init_state(clip[:, 0]), []
    for frame in clip.unbind(1):
        pair, state = split.step(frame, state)
        assert pair[1] is frame
        seen.append(pair[0].numel() > 0)
    assert seen == [True, False, False, True]
    means = {is_causal: Join(3, is_causal=is_causal)((clip[:, ::3], clip))[:, :, 3:] for is_causal in (False, True)}
    close(means[False], clip[:, :3].mean(1, keepdim=True))
    close(means[True], torch.stack([clip[:, 0] / 3, clip[:, 1:4].mean(1)], dim=1))


@pytest.mark.parametrize("kind", ["slowfast", "i3d"])
@torch.no_grad()
def test_no_causal_answer_feels_a_later_frame(kind: str) -> None:
    causal: Any = slowfast(is_causal=True) if kind == "slowfast" else single(kind, is_causal=True)
    other: Any = slowfast() if kind == "slowfast" else single(kind)
    other.load_state_dict(causal.state_dict())  # the same weights load
    period, clip = causal.streaming().period_ticks, clip_of(16)
    for start in (1, 6, 13):
        poisoned = clip.clone()
        poisoned[:, start:] = float("nan")
        early = -(-start // period)
        assert_equal(causal.answers(poisoned)[:, :early], causal.answers(clip)[:, :early])
        assert causal.answers(poisoned)[:, early:].isnan().all()
        assert other.answers(poisoned)[:, :early].isnan().any()


@pytest.mark.parametrize("name", NAMES)
def test_the_spec_says_what_the_stream_does(name: str) -> None:
    spec = model_info(name).input_spec
    with torch.device("meta"):
        model: Any = create_model(name)
    stream = model.streaming()
    assert stream.delay_ticks == spec.delay_ticks
    assert spec.causal == name.endswith("_causal") == (spec.delay_ticks == 0)
    assert stream.period_ticks == {"slow": 1, "c2d": 2, "i3d": 2, "slowfast": 4}[name.partition("_")[0]]
    assert spec.min_frames == model.min_frames
    assert (spec.layout, spec.mean[0], spec.std[0], spec.size_px) == ("BTCHW", 0.45, 0.225, (224, 224))
    assert (spec.num_frames, spec.frame_step) == ((32, 2) if name.startswith("slowfast") else (8, 8))
    assert model.num_features == (2304 if name.startswith("slowfast") else 2048)
    streamed = input_spec_of(stream)
    assert (streamed.layout, streamed.num_frames, streamed.delay_ticks) == ("BCHW", 1, spec.delay_ticks)


def test_by_name(tmp_path: Any) -> None:
    assert set(NAMES) <= set(list_models("*_r50*"))
    file = save_weights(single("c2d"), tmp_path / "three.safetensors")
    again = load_weights(SinglePathway(PLANS["c2d"], 3, depths=(1, 2, 1, 2), width=4, is_causal=True).double(), file)
    assert_equal(again.state_dict(), single("c2d").state_dict())
    for name in ("slow_r50", "slowfast_r50"):
        with pytest.raises(WeightsError, match=f"{name} has no default weights; give a local"):
            create_model(name, weights="default")


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("slowfast", (1, 3, 3, 32, 32), "SlowFast was given 3 frames; it needs 4 or more"),
        ("c2d", (1, 1, 3, 32, 32), "SinglePathway was given 1 frames; it needs 2 or more"),
        ("slowfast", (1, 3, 8, 32, 32), r"expected \(B, T, 3, H, W\); .*use transpose\(1, 2\)"),
        ("slow", (1, 3, 8, 32, 32), r"expected \(B, T, 3, H, W\); .*use transpose\(1, 2\)"),
        ("i3d", (3, 32, 32), r"given the shape \(3, 32, 32\); expected \(B, T, 3, H, W\)"),
    ],
)
def test_wrong_clips_are_refused(kind: str, shape: tuple[int, ...], message: str) -> None:
    net: Any = slowfast() if kind == "slowfast" else single(kind)
    for method in (net, net.answers, net.features):
        with pytest.raises(LayoutError, match=message):
            method(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("is_causal", [False, True])
@torch.no_grad()
def test_slowfast_carries_a_head_of_maps_and_runs_in_an_engine(is_causal: bool) -> None:
    """The causal stream is cut between its stages; the other one is one layer, before the head's."""
    clip = clip_of(12, 64, 64)[:1]
    model = DenseModel(slowfast(is_causal=is_causal), 2, num_inner=4).double().eval()
    maps = model(clip)
    assert maps.shape == (1, 3, 2, 16, 16)
    close(step_through(model.streaming(), clip, and_finish=True)[0], maps)
    most = 8 if is_causal else 2
    for num_stages, executor in ((2, "inline"), (most, "inline"), (most, "threads")):
        stages = cut(model.streaming(), clip[:, 0], num_stages=num_stages, costs="uniform")
        assert len(stages.stages) == num_stages
        outputs = list(run(pipelined(stages), clip.unbind(1), executor=executor))
        assert [o.frame_index for o in outputs] == [0, 4, 8]
        close(torch.stack([o.value for o in outputs], 1), maps)
