"""Clips on which torch's bfloat16 gradients are wrong on a CPU are refused; others, and float32, are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from train.tiny import Tiny, tiny_fit

from sidestream.errors import InputError
from sidestream.train.short_convolutions import no_short_convolutions

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("num_frames", "padding", "is_refused"),
    [(1, 2, False), (2, 2, True), (4, 2, True), (5, 2, False), (4, "same", True)],
)
def test_kernels_longer_than_the_clip(num_frames: int, padding: int | str, is_refused: bool) -> None:
    net = nn.Sequential(nn.Conv3d(1, 1, (5, 1, 1), padding=padding if padding == "same" else (padding, 0, 0)))
    clip = torch.zeros(1, 1, num_frames, 2, 2)
    for precision, on in (("no", CPU), ("bf16", torch.device("meta"))):
        with no_short_convolutions(net, precision, on):
            net(clip)
    with no_short_convolutions(net, "bf16", CPU):
        if is_refused:
            with pytest.raises(InputError, match=f"'0' reads {num_frames} steps in time under a kernel of 5"):
                net(clip)
        else:
            net(clip)
    net(clip)
    assert not net[0]._forward_pre_hooks


def test_fit_refuses_them_before_anything_is_written(tmp_path: Path) -> None:
    model = Tiny()
    model.conv1 = nn.Conv3d(3, 6, (5, 5, 5), (1, 2, 2), (2, 2, 2))  # clips have 4 frames
    with pytest.raises(InputError, match=r"conv1.*bfloat16 on a CPU"):
        tiny_fit(tmp_path / "run", net=model, precision="bf16")
    assert not (tmp_path / "run").exists()
