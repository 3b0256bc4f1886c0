"""Blocks of 3D nets on streams: against torchvision's own, and by the contract."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.video import resnet
from torchvision.models.video.s3d import SepInceptionBlock3D, TemporalSeparableConv

from contract import check_streaming_layer
from sidestream.errors import ModelError
from sidestream.models.conv3d_blocks import OnMaps, streaming_form

NORM = partial(nn.BatchNorm3d, eps=0.001)


def clip(num_frames: int = 6) -> Tensor:
    return torch.rand(2, num_frames, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5


def lively(module: nn.Module) -> Any:
    """Norms whose statistics and gains are not 0 and 1."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm3d):
            for value in (m.weight, m.running_var):
                nn.init.uniform_(value, 0.5, 1.5)
            for value in (m.bias, m.running_mean):
                nn.init.normal_(value, std=0.2)
    return module.double().eval()


def projected(stride: int | tuple[int, int, int], num_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(4, num_out, 1, stride, bias=False), nn.BatchNorm3d(num_out))


BLOCKS: list[Any] = [
    pytest.param(lambda: resnet.BasicBlock(4, 4, resnet.Conv3DSimple), 2, id="basic"),
    pytest.param(lambda: resnet.BasicBlock(4, 3, resnet.Conv3DSimple, 2, projected(2, 3)), 3, id="basic, stride 2"),
    pytest.param(
        lambda: resnet.BasicBlock(4, 3, resnet.Conv3DNoTemporal, 2, projected((1, 2, 2), 3)), 0, id="in space only"
    ),
    pytest.param(lambda: resnet.BasicBlock(4, 3, resnet.Conv2Plus1D, 2, projected(2, 3)), 3, id="2+1"),
    pytest.param(lambda: resnet.Bottleneck(4, 2, resnet.Conv2Plus1D, 2, projected(2, 8)), 1, id="bottleneck"),
    pytest.param(lambda: SepInceptionBlock3D(4, 2, 3, 2, 2, 3, 2, NORM), 1, id="inception"),
    pytest.param(lambda: TemporalSeparableConv(4, 3, 7, 2, 3, NORM), 3, id="separable"),
]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("make", "delay_ticks"), BLOCKS)
def test_blocks_keep_the_streaming_contract(make: Any, delay_ticks: int, is_causal: bool) -> None:
    torch.manual_seed(3)
    layer = streaming_form(lively(make()), is_causal=is_causal)
    assert layer.delay_ticks == (0 if is_causal else delay_ticks)
    check_streaming_layer(layer, clip(), is_causal=layer.delay_ticks == 0)


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize(("make", "delay_ticks"), BLOCKS)
@pytest.mark.parametrize("num_frames", [1, 5, 8])
def test_the_clip_form_equals_torchvision(make: Any, delay_ticks: int, num_frames: int, is_training: bool) -> None:
    """In value, gradients and what the batch norms learn; the mode is that of the net, set afterwards."""
    torch.manual_seed(3)
    theirs = lively(make())
    ours = copy.deepcopy(theirs)
    layer = streaming_form(ours)
    assert {id(p) for p in layer.parameters()} == {id(p) for p in ours.parameters()}
    results = []
    for net, form in (
        (ours.train(is_training), layer),
        (theirs.train(is_training), lambda x: theirs(x.transpose(1, 2)).transpose(1, 2)),
    ):
        given = clip(num_frames).requires_grad_()
        answers = form(given)
        weights = torch.rand(answers.shape, generator=torch.Generator().manual_seed(5), dtype=answers.dtype)
        gradients = torch.autograd.grad((answers * weights).sum(), [given, *net.parameters()])
        results.append([answers, *gradients, *(b for b in net.buffers() if b.is_floating_point())])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-11)  # float64, order of sums


def test_other_modules_are_refused_or_stay() -> None:
    with pytest.raises(ModelError, match="LSTM has no streaming form"):
        streaming_form(nn.Sequential(nn.ReLU(), nn.LSTM(3, 3)))
    layer = OnMaps(nn.ReLU())
    assert streaming_form(layer) is layer
