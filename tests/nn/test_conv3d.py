"""3D convolutions on streams against torch's own, and against loops over taps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestream.errors import LayoutError, ModelError
from sidestream.nn.conv3d import CausalConv3d, Conv3d
from sidestream.nn.steppable import step_through
from sidestream.nn.window import Window


def clip(num_frames: int = 8) -> Tensor:
    return torch.rand(2, num_frames, 4, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5


OPTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 1, 2), "stride": (2, 1, 2), "padding": (1, 0, 1)},
    {"kernel_size": (5, 3, 3), "stride": 2, "padding": (2, 1, 0), "groups": 2, "bias": False},
    {"kernel_size": (3, 2, 2), "dilation": (2, 1, 3), "padding": (2, 1, 1), "groups": 4},
    {"kernel_size": (2, 1, 1)},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("num_frames", [2, 5, 8])
def test_a_stream_equals_torch_conv3d(options: dict, num_frames: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv3d(4, 8, **options).double()
    layer = Conv3d(4, 8, **options).double()
    layer.load_state_dict(conv.state_dict(), strict=True)
    expected = conv(clip(num_frames).transpose(1, 2)).transpose(1, 2)
    for answers in (layer(clip(num_frames)), step_through(layer, clip(num_frames), and_finish=True)[0]):
        torch.testing.assert_close(answers, expected, rtol=0, atol=1e-12)
    assert all(a is b for a, b in zip(Conv3d.from_torch(conv).parameters(), conv.parameters(), strict=True))


@pytest.mark.parametrize("options", OPTIONS)
def test_interior_answers_need_no_padding(options: dict) -> None:
    """The steps that answer before the stream ends are those of a convolution over the frames themselves."""
    layer = Conv3d(4, 8, **options).double()
    answers, _ = step_through(layer, clip())
    stride, left = layer.window.stride, layer.window.left
    space = (0, *layer.space_padding[1:])
    first = -(-left // stride)  # the first answer whose window holds no frame before the stream
    frames = clip()[:, first * stride - left :].transpose(1, 2)
    bare = F.conv3d(frames, layer.weight, layer.bias, layer.stride, space, layer.dilation, layer.groups)
    torch.testing.assert_close(answers[:, first:], bare.transpose(1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_causal_form_equals_a_sum_over_earlier_frames(options: dict) -> None:
    space = options.get("padding", 0)
    layer = CausalConv3d(4, 8, **options | {"padding": space[1:] if isinstance(space, tuple) else space}).double()
    kernel, stride, dilation = layer.weight.shape[2], layer.stride[0], layer.dilation[0]
    frames, expected = clip().unbind(1), []
    for t in range(0, len(frames), stride):
        total = None
        for tap in range(kernel):
            source = t - (kernel - 1 - tap) * dilation
            frame = frames[source] if source >= 0 else torch.zeros_like(frames[0])
            weight = layer.weight[:, :, tap]
            part = F.conv2d(
                frame, weight, None, layer.stride[1:], layer.space_padding[1:], layer.dilation[1:], layer.groups
            )
            total = part if total is None else total + part
        expected.append(total if layer.bias is None else total + layer.bias[:, None, None])
    torch.testing.assert_close(step_through(layer, clip())[0], torch.stack(expected, 1), rtol=0, atol=1e-12)


FOLDED = [*OPTIONS, {"kernel_size": (7, 3, 3), "padding": (3, 1, 1)}, {"kernel_size": 1, "stride": 2}]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("num_channels", [4, 12])
@pytest.mark.parametrize("options", FOLDED)
def test_one_window_equals_conv3d(options: dict, num_channels: int, layout: torch.memory_format) -> None:
    """The form of one answer, on either side of the choice, in value and gradients, wherever the weights lie."""
    torch.manual_seed(0)
    layer = Conv3d(num_channels, 8, **options).double()
    layer.weight.data = layer.weight.data.contiguous(memory_format=layout)
    shape = (2, num_channels, layer.window.span + 1, 6, 5)
    window_BCTHW = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    settings = (layer.stride, layer.space_padding, layer.dilation, layer.groups)
    expected = F.conv3d(window_BCTHW, layer.weight, layer.bias, *settings)
    for actual in (layer.slide(window_BCTHW), layer._one_window(window_BCTHW)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
        given = [window_BCTHW, *layer.parameters()]
        weights = torch.rand(expected.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        gradients = [torch.autograd.grad((a * weights).sum(), given, retain_graph=True) for a in (actual, expected)]
        for by_fold, by_conv3d in zip(*gradients, strict=True):
            assert by_conv3d.any()
            torch.testing.assert_close(by_fold, by_conv3d, rtol=0, atol=1e-11)


@torch.no_grad()
def test_steps_follow_the_weights_of_now() -> None:
    """Nothing is kept of the weights between steps: what training writes into them counts at once."""
    layer, frame_BCHW = CausalConv3d(4, 8, 3, padding=1).double(), clip()[:, 0]
    state = layer.init_state(frame_BCHW)
    before, _ = layer.step(frame_BCHW, state)
    layer.weight.mul_(2)
    after, _ = layer.step(frame_BCHW, state)
    bias = layer.bias[:, None, None]
    torch.testing.assert_close(after - bias, 2 * (before - bias), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_step_can_be_exported() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = CausalConv3d(4, 8, 3, padding=1).double()

        def forward(self, frame_BCHW: Tensor, kept_BCTHW: Tensor) -> Tensor:
            return self.layer.step(frame_BCHW, (kept_BCTHW, 0))[0]

    step, frames = Step(), clip()
    given = (frames[:, 2], frames[:, :2].transpose(1, 2))
    exported = torch.export.export(step, given)
    names = {str(node.target) for node in exported.graph.nodes}
    assert "aten.conv2d.default" in names
    assert "aten.conv3d.default" not in names
    assert torch.equal(exported.module()(*given), step(*given))


def test_the_example_of_the_contract() -> None:
    """Drawn in nn/steppable.py: kernel 3, stride 2, padding 1, five frames."""
    layer = Conv3d(1, 1, (3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0), bias=False)
    nn.init.ones_(layer.weight)
    frames, said = torch.arange(1.0, 6.0).reshape(5, 1, 1, 1, 1), []
    state = layer.init_state(frames[0])
    for frame in frames:
        answer, state = layer.step(frame, state)
        said.append(answer if isinstance(answer, Tensor) else repr(answer))
    assert said == ["NOTHING", 3.0, "NOTHING", 9.0, "NOTHING"]
    assert layer.finish(state) == (9.0,)
    assert (layer.delay_ticks, layer.period_ticks) == (1, 2)


@pytest.mark.parametrize("num_frames", range(1, 9))
@pytest.mark.parametrize("window", [Window(3, 2, 1, 1, 1), Window(4, 2, 2, 1, 3), Window(2, 3), Window.causal(3, 2, 2)])
def test_the_number_of_answers_is_that_of_torch(window: Window, num_frames: int) -> None:
    total = num_frames + window.left + window.right
    frames, weight = torch.zeros(1, 1, total), torch.zeros(1, 1, window.kernel)
    is_enough = total > window.span
    expected = F.conv1d(frames, weight, None, window.stride, 0, window.dilation).shape[2] if is_enough else 0
    assert window.num_answers(num_frames) == expected


def test_wrong_requests() -> None:
    with pytest.raises(ModelError, match=r"padding='same' .* no streaming form"):
        Conv3d.from_torch(nn.Conv3d(1, 1, 3, padding="same"))
    with pytest.raises(ModelError, match="padding_mode='circular'"):
        CausalConv3d.from_torch(nn.Conv3d(1, 1, 3, padding_mode="circular"))
    with pytest.raises(ModelError, match="blank frames only"):
        Conv3d(1, 1, (1, 3, 3), padding=1)
    with pytest.raises(ModelError, match="is no window"):
        Window(0)
    with pytest.raises(ModelError, match=r"stride=\(1, 2\) must be one number, or three"):
        Conv3d(1, 1, 3, stride=(1, 2))  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="a clip of 2 frames is too short"):
        Conv3d(1, 1, (3, 1, 1))(torch.rand(1, 2, 1, 1, 1))
