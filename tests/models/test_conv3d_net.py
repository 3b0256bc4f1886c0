"""3D nets: clip form and stream agree, causal ones see no later frame, wrong clips are refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.video import S3D, resnet
from torchvision.models.video.s3d import SepInceptionBlock3D, TemporalSeparableConv

from contract import assert_equal, check_streaming_layer
from sidestream.circuit.cut import cut
from sidestream.circuit.wiring import pipelined
from sidestream.engine.run import run
from sidestream.errors import LayoutError, ModelError
from sidestream.models import create_model
from sidestream.models.c3d import C3DLayers
from sidestream.models.conv3d_net import Conv3dNet
from sidestream.nn.steppable import step_through
from sidestream.types import NOTHING


def slim_resnet(maker: Any, block: Any = resnet.BasicBlock) -> nn.Module:
    """torchvision's net with one block per group, of 4 to 7 channels."""
    net = resnet.VideoResNet.__new__(resnet.VideoResNet)
    nn.Module.__init__(net)
    net.inplanes = 4
    net.stem = nn.Sequential(nn.Conv3d(3, 4, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False), nn.BatchNorm3d(4), nn.ReLU())
    for n in range(1, 5):
        net.add_module(f"layer{n}", net._make_layer(block, maker, n + 3, 1, stride=1 if n == 1 else 2))
    net.fc = nn.Linear(7 * block.expansion, 5)
    return net


def slim_s3d() -> nn.Module:
    """torchvision's net with one Inception block between its poolings, of few channels."""
    norm, net = partial(nn.BatchNorm3d, eps=0.001), S3D.__new__(S3D)
    nn.Module.__init__(net)
    net.features = nn.Sequential(
        TemporalSeparableConv(3, 4, 7, 2, 3, norm),
        nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        SepInceptionBlock3D(4, 2, 3, 2, 2, 3, 2, norm),
        nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        nn.MaxPool3d(3, 2, 1),
        SepInceptionBlock3D(9, 2, 2, 3, 2, 2, 2, norm),
        nn.MaxPool3d(2, 2),
        SepInceptionBlock3D(9, 2, 2, 3, 2, 2, 2, norm),
    )
    net.classifier = nn.Sequential(nn.Dropout(0.2), nn.Conv3d(9, 5, 1))
    return net


# Net; look-ahead and frames per answer of the stream; fewest frames; frames and pixels to test with.
NETS: list[Any] = [
    pytest.param(lambda: slim_resnet(resnet.Conv3DSimple), 1 + 2 + 3 + 6 + 12, 8, 9, 8, id="r3d"),
    pytest.param(lambda: slim_resnet(resnet.Conv2Plus1D), 24, 8, 9, 8, id="r2plus1d"),
    pytest.param(lambda: slim_resnet(resnet.Conv2Plus1D, resnet.Bottleneck), 9, 8, 9, 8, id="bottlenecks"),
    pytest.param(lambda: slim_resnet(resnet.Conv3DNoTemporal), 1, 1, 5, 8, id="in space only"),
    pytest.param(slim_s3d, 3 + 2 + 2 + 4 + 4 + 8 + 8, 8, 17, 32, id="s3d"),
    pytest.param(lambda: C3DLayers(5, width=1 / 32), 45, 16, 17, 16, id="c3d"),
]


def made(make: Any, *, is_causal: bool = False) -> Conv3dNet:
    """float64, weights and statistics that show every mistake."""
    torch.manual_seed(6)
    model = Conv3dNet(make(), is_causal=is_causal).double().eval()
    for name, value in model.state_dict().items():
        if value.ndim > 1:
            nn.init.normal_(value, std=(2 / value[0].numel()) ** 0.5)
        elif value.is_floating_point():
            lowest, highest = (0.5, 1.5) if name.endswith(("weight", "var")) else (0.0, 0.3)
            nn.init.uniform_(value, lowest, highest)
            if name.endswith("bias"):
                value.add_(0.5)  # so that no ReLU of the narrow nets is shut for good
    return model


def moving_clip(num_frames: int, size_px: tuple[int, int], *, num_streams: int = 1) -> Tensor:
    shape = (num_streams, num_frames, 3, *size_px)
    return torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 4 - 2


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("make", "delay_ticks", "period_ticks", "num_frames", "px"), NETS)
def test_keeps_the_streaming_contract(
    make: Any, delay_ticks: int, period_ticks: int, num_frames: int, px: int, is_causal: bool
) -> None:
    stream = made(make, is_causal=is_causal).streaming()
    assert (stream.delay_ticks, stream.period_ticks) == (0 if is_causal else delay_ticks, period_ticks)
    check_streaming_layer(stream, moving_clip(num_frames, (px, px), num_streams=2), is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("make", "delay_ticks", "period_ticks", "num_frames", "px"), NETS)
@torch.no_grad()
def test_any_length_and_size(
    make: Any, delay_ticks: int, period_ticks: int, num_frames: int, px: int, is_causal: bool
) -> None:
    """Answers and maps of a stream, each in its promised tick, are those of the clip, the edges included."""
    model = made(make, is_causal=is_causal)
    for length in (model.min_frames, num_frames + 4):
        clip_BTCHW = moving_clip(length, (px + 5, px + 18), num_streams=2)
        for stream, expected in (
            (model.streaming(), model.answers(clip_BTCHW)),
            (model.streaming_features(), model.features(clip_BTCHW)),
        ):
            answers, ticks, state = [], [], stream.init_state(clip_BTCHW[:, 0])
            for tick, frame_BCHW in enumerate(clip_BTCHW.unbind(1)):
                answer, state = stream.step(frame_BCHW, state)
                if answer is not NOTHING:
                    answers.append(answer)
                    ticks.append(tick)
            assert ticks == list(range(stream.delay_ticks, length, stream.period_ticks))
            whole = torch.stack([*answers, *stream.finish(state)], 1)
            torch.testing.assert_close(whole, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(model(clip_BTCHW), model.answers(clip_BTCHW).mean(1), rtol=0, atol=0)
        assert model.features(clip_BTCHW).shape[2] == model.num_features


@pytest.mark.parametrize(("make", "delay_ticks", "period_ticks", "num_frames", "px"), NETS)
@torch.no_grad()
def test_what_an_answer_may_see(make: Any, delay_ticks: int, period_ticks: int, num_frames: int, px: int) -> None:
    """With NaN from a frame on, a causal net answers unchanged up to it; the other one does not."""
    clip_BTCHW, first_bad = moving_clip(48, (px, px)), 33
    poisoned = clip_BTCHW.clone()
    poisoned[:, first_bad:] = float("nan")
    for is_causal in (True, False):
        model = made(make, is_causal=is_causal)
        sound, seen = model.answers(clip_BTCHW), model.answers(poisoned)
        num_before = -(-first_bad // period_ticks)
        assert torch.equal(seen[:, :num_before], sound[:, :num_before]) == is_causal
        assert seen[:, num_before:].isnan().all()
        if is_causal:  # and each feels the newest frame it may see
            poisoned_at = clip_BTCHW.clone()
            poisoned_at[:, (num_before - 1) * period_ticks] = float("nan")
            assert model.answers(poisoned_at)[:, num_before - 1].isnan().all()


@pytest.mark.parametrize(("make", "delay_ticks", "period_ticks", "num_frames", "px"), NETS)
@torch.no_grad()
def test_causal_variant_has_the_same_weights_and_other_answers(
    make: Any, delay_ticks: int, period_ticks: int, num_frames: int, px: int
) -> None:
    plain, causal, clip_BTCHW = made(make), made(make, is_causal=True), moving_clip(32, (px, px))
    assert_equal(causal.state_dict(), plain.state_dict())
    assert not torch.allclose(causal(clip_BTCHW), plain(clip_BTCHW), rtol=1e-3)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["r3d_18", "r2plus1d_18", "s3d"])
@torch.no_grad()
def test_real_nets_on_a_stream(name: str, is_causal: bool) -> None:
    torch.manual_seed(0)
    model = create_model(name + "_causal" * is_causal)
    clip_BTCHW = moving_clip(16, (32, 40)).float()
    answers, _ = step_through(model.streaming(), clip_BTCHW, and_finish=True)
    expected = model.answers(clip_BTCHW)
    # float32: convolutions over one frame and over many sum in another order, through 17 to 40 layers
    torch.testing.assert_close(answers, expected, rtol=1e-3, atol=2e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_pipelined_stream_equals_stepping_by_hand_to_the_bit() -> None:
    stream, clip_BTCHW = made(NETS[1].values[0], is_causal=True).streaming(), moving_clip(20, (16, 16))
    frames = list(clip_BTCHW.unbind(1))
    by_hand, _ = step_through(stream, clip_BTCHW)
    circuit = pipelined(cut(stream, frames[0], num_stages=3))
    outputs = list(run(circuit, frames, executor="threads", num_threads=2))
    assert_equal([o.value for o in outputs], list(by_hand.unbind(1)))
    assert [o.frame_index for o in outputs] == [0, 8, 16]


def test_parameters_are_shared_not_copied_and_modes_followed() -> None:
    model = made(slim_s3d)
    for stream in (model.streaming(), model.streaming_features()):
        assert {id(p) for p in stream.parameters()} <= {id(p) for p in model.parameters()}
        assert not stream.training
    assert len(list(model.streaming().parameters())) == len(list(model.parameters()))
    clip_BTCHW = moving_clip(16, (32, 32))
    mean = next(b for name, b in model.named_buffers() if name.endswith("running_mean"))
    before = mean.clone()
    model(clip_BTCHW)
    assert torch.equal(mean, before)
    model.train()(clip_BTCHW)
    assert not torch.equal(mean, before)


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (slim_s3d, (1, 12, 3, 32, 32), r"S3D was given 12 frames; it needs 13 or more"),
        (slim_s3d, (1, 13, 3, 16, 32), r"S3D was given frames of \(16, 32\) pixels; it needs 17 or more"),
        (NETS[-1].values[0], (1, 15, 3, 16, 16), r"C3DLayers was given 15 frames; it needs 16"),
        (NETS[-1].values[0], (1, 16, 3, 15, 16), r"it needs 16 or more in height and width"),
        (NETS[0].values[0], (1, 3, 16, 8, 8), r"shape \(1, 3, 16, 8, 8\); .*use transpose\(1, 2\)"),
        (NETS[0].values[0], (3, 8, 8), r"expected \(B, T, 3, H, W\)"),
        (NETS[0].values[0], (1, 0, 3, 8, 8), r"given 0 frames; it needs 1"),
    ],
)
def test_wrong_clips_are_refused(make: Any, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        made(make)(torch.zeros(shape, dtype=torch.float64))


def test_the_fewest_frames_and_pixels_are_enough() -> None:
    assert made(slim_s3d)(moving_clip(13, (17, 17))).shape == (1, 5)
    assert made(NETS[-1].values[0])(moving_clip(16, (16, 16))).shape == (1, 5)
    assert made(NETS[0].values[0])(moving_clip(1, (1, 1))).shape == (1, 5)


def test_other_nets_are_refused() -> None:
    with pytest.raises(ModelError, match="Linear has no streaming form here; give torchvision's VideoResNet"):
        Conv3dNet(nn.Linear(3, 3))
