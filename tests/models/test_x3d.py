"""X3D: streams against clips, causality, the squeeze over the newest frames, refusals.

Values against pytorchvideo are in ``tests/parity``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from contract import assert_equal, check_streaming_layer
from sidestream.errors import LayoutError, ModelError, WeightsError
from sidestream.models import create_model, list_models, model_info
from sidestream.models.x3d import X3D, StreamedX3D
from sidestream.models.x3d_layers import Plan, Squeeze, SqueezedFrames, round_width
from sidestream.nn.steppable import step_through

NAMES = [f"x3d_{size}{suffix}" for size in ("xs", "s", "m", "l") for suffix in ("", "_causal")]
SMALL: dict[str, Any] = {"depths": (1, 2, 1, 1), "widths": (8, 8, 16, 16), "num_inner": 12}


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
            value.copy_(torch.randn(value.shape, generator=chance, dtype=value.dtype) * 0.2)
    return net


def streamed(squeeze_frames: int, *, is_causal: bool = True) -> StreamedX3D:
    return randomised(StreamedX3D(3, squeeze_frames=squeeze_frames, is_causal=is_causal, **SMALL))


def clip_of(num_frames: int, height: int = 32, width: int = 32) -> Tensor:
    shape = (2, num_frames, 3, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)  # float64, sums in another order


@pytest.mark.parametrize(("squeeze_frames", "num_frames"), [(1, 5), (3, 7), (13, 6)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_keeps_the_contract(is_causal: bool, squeeze_frames: int, num_frames: int) -> None:
    stream = streamed(squeeze_frames, is_causal=is_causal).streaming()
    assert stream.delay_ticks == (0 if is_causal else 7)  # 2 of the stem and 1 of each block
    check_streaming_layer(stream, clip_of(num_frames), is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@torch.no_grad()
def test_streams_give_the_answers_and_features_of_clips(is_causal: bool) -> None:
    net = streamed(4, is_causal=is_causal)
    for clip in (clip_of(9, 40, 64), clip_of(3)):
        features = net.features(clip)
        assert features.shape == (2, clip.shape[1], net.num_features, -(-clip.shape[3] // 32), clip.shape[4] // 32)
        close(step_through(net.streaming(), clip, and_finish=True)[0], net.answers(clip))
        close(net.streaming()(clip), net.answers(clip))
        close(step_through(net.streaming_features(), clip, and_finish=True)[0], features)


@torch.no_grad()
def test_answers_are_the_head_on_single_steps() -> None:
    net = randomised(X3D(3, **SMALL))
    clip = clip_of(6)
    pooled = net.features(clip).mean((3, 4))
    for t in range(6):
        close(net.answers(clip)[:, t], net.head(pooled[:, t]))
    close(net(clip), net.head(pooled.mean(1)))
    assert not torch.allclose(net.answers(clip).mean(1), net(clip))  # the head's ReLU comes after the mean
    close(net.answers(clip[:, :1])[:, 0], net(clip[:, :1]))


@pytest.mark.parametrize("num_newest", [1, 3, 20])
@torch.no_grad()
def test_squeeze_equals_its_slow_twin(num_newest: int) -> None:
    squeeze, maps = randomised(Squeeze(4, 8, num_newest)), clip_of(7, 5, 6)[:, :, :1].expand(-1, -1, 4, -1, -1)
    maps = (maps * torch.arange(1.0, 5.0).reshape(4, 1, 1)).transpose(1, 2)
    reduce, expand = (layer.weight.flatten(1) for layer in (squeeze.reduce, squeeze.expand))
    for t in range(7):
        mean_BC = maps[:, :, max(0, t - num_newest + 1) : t + 1].mean((2, 3, 4))
        gate_BC = torch.sigmoid(
            (mean_BC @ reduce.T + squeeze.reduce.bias).clamp(min=0) @ expand.T + squeeze.expand.bias
        )
        gated = maps[:, :, t] * gate_BC[:, :, None, None]
        close(squeeze(maps)[:, :, t], gated * torch.sigmoid(gated))


@torch.no_grad()
def test_squeezes_agree_on_the_last_frame_of_a_clip_of_the_trained_length() -> None:
    newest, whole = randomised(Squeeze(3, 8, 6)), randomised(Squeeze(3, 8, None))
    maps = clip_of(6, 5, 6).transpose(1, 2)
    close(newest(maps)[:, :, -1], whole(maps)[:, :, -1])
    assert not torch.allclose(newest(maps)[:, :, -2], whole(maps)[:, :, -2])


@pytest.mark.parametrize("num_newest", [1, 3])
def test_squeeze_keeps_the_contract(num_newest: int) -> None:
    squeeze = randomised(Squeeze(3, 8, num_newest))
    check_streaming_layer(SqueezedFrames(squeeze, num_newest), clip_of(6, 3, 4), receptive_field=num_newest)
    with pytest.raises(ModelError, match="over the whole clip, which a stream does not have; take StreamedX3D"):
        Squeeze(3, 8, None).streaming()


@torch.no_grad()
def test_the_published_net_sees_all_frames_and_claims_no_stream() -> None:
    published, causal, clip = randomised(X3D(3, **SMALL)), streamed(8), clip_of(8)
    assert not hasattr(published, "streaming")
    causal.load_state_dict(published.state_dict())  # the same weights load
    for start in (1, 4, 7):
        poisoned = clip.clone()
        poisoned[:, start:] = float("nan")
        assert_equal(causal.answers(poisoned)[:, :start], causal.answers(clip)[:, :start])
        assert causal.answers(poisoned)[:, start:].isnan().all()
        assert published.answers(poisoned).isnan().all()


@torch.no_grad()
def test_the_causal_net_is_the_published_one_with_past_padding_and_gates_of_all_so_far() -> None:
    """On one frame, where both squeezes are the same, only the padding differs."""
    plan = Plan(None, is_causal=True)
    whole, causal = randomised(X3D(3, plan=plan, **SMALL)), streamed(5)
    close(causal(clip_of(1)), whole(clip_of(1)))
    assert not torch.allclose(causal(clip_of(4)), whole(clip_of(4)))


@pytest.mark.parametrize("name", NAMES)
def test_the_spec_says_what_the_model_does(name: str) -> None:
    spec = model_info(name).input_spec
    with torch.device("meta"):
        model: Any = create_model(name)
    frames, step, size_px = {"xs": (4, 12, 160), "s": (13, 6, 160), "m": (16, 5, 224), "l": (16, 5, 312)}[
        name.split("_")[1]
    ]
    assert (spec.num_frames, spec.frame_step, spec.size_px) == (frames, step, (size_px, size_px))
    assert (spec.layout, spec.mean[0], spec.std[0], spec.delay_ticks) == ("BTCHW", 0.45, 0.225, 0)
    assert (spec.min_frames, model.min_frames, model.num_features) == (1, 1, 432)
    assert spec.causal == name.endswith("_causal") == hasattr(model, "streaming")
    if spec.causal:
        assert (model.streaming().delay_ticks, model.streaming().period_ticks) == (0, 1)


def test_by_name() -> None:
    assert set(list_models("x3d*")) == set(NAMES)
    with pytest.raises(WeightsError, match="x3d_m has no default weights; give a local"):
        create_model("x3d_m", weights="default")


def test_wrong_clips_are_refused() -> None:
    net = X3D(3, **SMALL)
    for method in (net, net.answers, net.features):
        with pytest.raises(LayoutError, match=r"X3D was given the shape .*; expected .*use transpose\(1, 2\)"):
            method(torch.zeros(1, 3, 8, 32, 32))
        with pytest.raises(LayoutError, match="X3D was given 0 frames; it needs 1 or more"):
            method(torch.zeros(1, 0, 3, 32, 32))


@pytest.mark.parametrize(
    ("width", "expected"), [(3.375, 8), (6.75, 8), (13.5, 16), (27, 32), (24, 24), (12, 16), (20, 24), (44, 48)]
)
def test_widths_are_rounded_to_multiples_of_eight(width: float, expected: int) -> None:
    assert round_width(width) == expected
