"""Converted networks against the torch modules that they were made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sidestream.errors import ModelError
from sidestream.nn.combine import Chain
from sidestream.nn.convert import lift, to_streaming
from sidestream.nn.pool import RunningMean
from sidestream.nn.steppable import step_through


def clip(num_frames: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, num_frames, 3, 12, 12, generator=generator, dtype=torch.float64) - 0.5


def network() -> nn.Sequential:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv3d(3, 6, (5, 3, 3), stride=(2, 2, 2), padding=(2, 1, 1)), nn.BatchNorm3d(6), nn.ReLU())
    model = nn.Sequential(
        stem,
        nn.MaxPool3d((3, 2, 2), stride=(1, 2, 2), padding=(1, 0, 0)),
        nn.Conv3d(6, 4, 3, padding=1, groups=2, bias=False),
        nn.GELU(),
        nn.AvgPool3d((2, 1, 1), stride=(2, 1, 1)),
        nn.Dropout(),
        nn.AdaptiveAvgPool3d((None, 1, 1)),
    ).double()
    for _ in range(3):
        model(clip().transpose(1, 2))  # running statistics
    return model.eval()


@pytest.mark.parametrize("num_frames", [4, 7, 8, 9])
def test_a_converted_network_equals_the_network(num_frames: int) -> None:
    model = network()
    streaming = to_streaming(model)
    expected = model(clip(num_frames).transpose(1, 2)).transpose(1, 2)
    assert (streaming.delay_ticks, streaming.period_ticks) == (2 + 2 * (1 + 1 + 1), 4)
    torch.testing.assert_close(streaming(clip(num_frames)), expected, rtol=0, atol=1e-12)
    answers, _ = step_through(streaming, clip(num_frames), and_finish=True)
    torch.testing.assert_close(answers, expected, rtol=0, atol=1e-12)


def test_parameters_and_statistics_are_shared() -> None:
    model = network()
    streaming = to_streaming(model).train()
    assert {id(p) for p in streaming.parameters()} == {id(p) for p in model.parameters()}
    norm = model[0][1]
    before = norm.running_mean.clone()
    streaming(clip())
    assert not torch.equal(norm.running_mean, before)


def test_a_batch_norm_in_training_mode_equals_torch_in_clip_form_and_is_not_taught_by_init_state() -> None:
    norm = nn.BatchNorm3d(3).double().train()
    expected = norm(clip().transpose(1, 2)).transpose(1, 2)
    layer = Chain(lift(norm))
    torch.testing.assert_close(layer(clip()), expected, rtol=0, atol=1e-12)
    before = norm.running_mean.clone()
    layer.init_state(clip()[:, 0])
    assert torch.equal(norm.running_mean, before)
    assert all(m.training for m in layer.modules())


def test_causal_twins_see_no_later_frame() -> None:
    streaming = to_streaming(network(), is_causal=True)
    assert streaming.delay_ticks == 0
    assert streaming(clip()).shape[1] == 3  # frames 0, 4 and 8


@pytest.mark.parametrize("build", [nn.Linear, nn.LayerNorm])
def test_linear_and_layer_norm_work_over_channels(build: type) -> None:
    module = (nn.Linear(3, 5) if build is nn.Linear else nn.LayerNorm(3)).double()
    with torch.no_grad():
        module.weight.uniform_(-1, 1)
    expected = torch.empty(2, 9, module.weight.shape[0], 12, 12, dtype=torch.float64)
    for row in range(12):
        for column in range(12):
            expected[..., row, column] = module(clip()[..., row, column])
    torch.testing.assert_close(lift(module)(clip()), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(lift(module)(clip()[..., 0, 0]), module(clip()[..., 0, 0]), rtol=0, atol=1e-12)


def test_streaming_layers_stay_as_they_are() -> None:
    mean = RunningMean()
    assert lift(mean) is mean
    assert to_streaming(mean) is mean


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.AdaptiveAvgPool3d(1), "AdaptiveAvgPool3d has no streaming form of its own; .*RunningMean"),
        (nn.InstanceNorm3d(3), "InstanceNorm3d has no streaming form"),
        (nn.MaxPool3d(2, ceil_mode=True), "ceil_mode"),
        (nn.MaxPool3d(2, return_indices=True), "return_indices"),
        (nn.MaxPool3d(2, dilation=2), "dilation"),
        (nn.MaxPool3d(2, dilation=(1, 1, 2)), "dilation"),
        (nn.AvgPool3d(2, ceil_mode=True), "ceil_mode"),
        (nn.AvgPool3d(2, divisor_override=3), "divisor_override"),
        (nn.AvgPool3d(3, padding=1, count_include_pad=False), "count_include_pad=False"),
    ],
)
def test_what_cannot_be_converted_is_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        to_streaming(nn.Sequential(nn.ReLU(), module))


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool3d(2, dilation=1),
        nn.MaxPool3d(2, dilation=(1, 1, 1)),
        nn.AvgPool3d(2, padding=1),
        nn.AvgPool3d(2, padding=0, count_include_pad=False),
        nn.AvgPool3d(2, padding=(0, 0, 0), count_include_pad=False),
    ],
)
def test_poolings_with_every_way_to_say_nothing_special(pool: nn.Module) -> None:
    expected = pool(clip(8).transpose(1, 2)).transpose(1, 2)
    answers, _ = step_through(to_streaming(pool), clip(8), and_finish=True)
    torch.testing.assert_close(answers, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["r3d_18", "r2plus1d_18"])
def test_parts_of_torchvision_nets(name: str) -> None:
    """Their stems, and the trunk of their first block of stride 2, are Sequential with subclasses inside."""
    video = pytest.importorskip("torchvision.models.video")
    torch.manual_seed(0)
    net = getattr(video, name)().double().eval()
    part = nn.Sequential(net.stem, net.layer1[0].conv1, net.layer2[0].conv1, net.layer2[0].conv2)
    expected = part(clip(6).transpose(1, 2)).transpose(1, 2)
    answers, _ = step_through(to_streaming(part), clip(6), and_finish=True)
    torch.testing.assert_close(answers, expected, rtol=0, atol=1e-11)
    assert to_streaming(part).delay_ticks == 1 + 1 + 1 + 2 * 1


def test_a_subclass_that_computes_something_else_is_refused() -> None:
    class Doubled(nn.Sequential):
        def forward(self, clip_BCTHW: Tensor) -> Tensor:
            return 2 * super().forward(clip_BCTHW)

    with pytest.raises(ModelError, match="Doubled has no streaming form"):
        to_streaming(Doubled(nn.ReLU()))
