"""C3D against the net written out in plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contract import check_streaming_layer
from sidestream.models.c3d import C3DLayers
from sidestream.models.conv3d_net import Conv3dNet


def narrow(width: float = 1 / 32, *, is_causal: bool = False) -> Conv3dNet:
    torch.manual_seed(2)
    model = Conv3dNet(C3DLayers(5, width=width), is_causal=is_causal).double().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.0, 0.3)
        else:
            nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)
    return model


def moving_clip(num_frames: int, size_px: tuple[int, int], *, num_streams: int = 1) -> Tensor:
    shape = (num_streams, num_frames, 3, *size_px)
    return torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2 - 1


def slow_twin(clip_BTCHW: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Logits over time (B, T', classes), as the paper's figure 3 reads."""
    x = clip_BTCHW.permute(0, 2, 1, 3, 4)
    groups = (("conv1",), ("conv2",), ("conv3a", "conv3b"), ("conv4a", "conv4b"), ("conv5a", "conv5b"))
    for number, group in enumerate(groups, start=1):
        for name in group:
            x = F.conv3d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1).clamp(min=0)
        kernel = (1, 2, 2) if number == 1 else (2, 2, 2)
        x = F.max_pool3d(x, kernel, kernel, padding=(0, 1, 1) if number == 5 else 0)
    steps = []
    for maps_BCHW in x.unbind(2):
        y = F.adaptive_avg_pool2d(maps_BCHW, 4).flatten(1)
        y = F.linear(y, state["fc6.weight"], state["fc6.bias"]).clamp(min=0)
        y = F.linear(y, state["fc7.weight"], state["fc7.bias"]).clamp(min=0)
        steps.append(F.linear(y, state["fc8.weight"], state["fc8.bias"]))
    return torch.stack(steps, 1)


@pytest.mark.parametrize(
    ("num_frames", "size_px"), [(16, (112, 112)), (16, (16, 40)), (31, (48, 33)), (32, (64, 64)), (50, (24, 24))]
)
def test_equals_the_plain_net(num_frames: int, size_px: tuple[int, int]) -> None:
    """In value and in the gradient of the input and of every parameter."""
    model, results = narrow(), []
    state = dict(model.net.named_parameters())
    for form in (model.answers, lambda x: slow_twin(x, state)):
        given = moving_clip(num_frames, size_px, num_streams=2).requires_grad_()
        answers = form(given)
        weights = torch.rand(answers.shape, generator=torch.Generator().manual_seed(5), dtype=answers.dtype)
        results.append([answers, *torch.autograd.grad((answers * weights).sum(), [given, *state.values()])])
    assert results[1][0].shape == (2, num_frames // 16, 5)
    for mine, expected in zip(*results, strict=True):
        assert expected.any()
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-11)  # float64, order of sums


@torch.no_grad()
def test_the_paper_net_reads_4_by_4_places_and_needs_no_adaptive_pooling() -> None:
    model = Conv3dNet(C3DLayers(5, width=1 / 16)).eval()
    maps_BTCHW = model.features(torch.randn(1, 16, 3, 112, 112))
    assert maps_BTCHW.shape == (1, 2, 32, 7, 7)
    assert model.net.pool5(maps_BTCHW.transpose(1, 2)).shape == (1, 32, 1, 4, 4)
    assert C3DLayers(487).fc6.weight.shape == (4096, 8192)


@pytest.mark.parametrize("is_causal", [False, True])
def test_keeps_the_streaming_contract(is_causal: bool) -> None:
    stream = narrow(is_causal=is_causal).streaming()
    assert (stream.delay_ticks, stream.period_ticks) == (0 if is_causal else 45, 16)
    check_streaming_layer(stream, moving_clip(17, (16, 16), num_streams=2), is_causal=is_causal)
