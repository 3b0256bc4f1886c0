"""Poisoning finds who looks ahead and by how much, and passes who does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sidestream.evals.causality import find_causality, poison
from sidestream.evals.compare_forms import forms_of
from sidestream.models.i3d import I3D
from sidestream.nn.attention import TemporalAttention
from sidestream.nn.conv3d import CausalConv3d, Conv3d
from sidestream.nn.pool import RunningMean


def clip(num_frames: int = 8) -> Tensor:
    return torch.rand(1, num_frames, 3, 4, 4, generator=torch.Generator().manual_seed(1)) - 0.5


def masked_mean(clip_BTCHW: Tensor) -> Tensor:
    """Causal, by weights of 0 for later frames: 0 times NaN is NaN, though no later pixel counts."""
    num_frames = clip_BTCHW.shape[1]
    weights_TT = torch.ones(num_frames, num_frames).tril()
    return torch.einsum("nt,btchw->bnchw", weights_TT, clip_BTCHW)


CASES: list[tuple[Callable[[Tensor], Tensor], bool, int]] = [
    (CausalConv3d(3, 2, 3, padding=1), True, 0),
    (Conv3d(3, 2, 3, padding=1), False, 1),
    (Conv3d(3, 2, (5, 1, 1), padding=(2, 0, 0)), False, 2),
    (nn.Sequential(Conv3d(3, 3, (3, 1, 1), padding=(1, 0, 0)), nn.ReLU(), Conv3d(3, 2, 3, padding=1)), False, 2),
    (RunningMean(), True, 0),
    (masked_mean, True, 0),
    (lambda c: c + 1e-6 * c.mean(1, keepdim=True), False, 7),
    (nn.Sequential(nn.Flatten(2), TemporalAttention(48, 2)), True, 0),
    (CausalConv3d(3, 2, (2, 1, 1), stride=(2, 1, 1)), True, 0),
    (lambda c: c.unflatten(1, (4, 2)).mean(2), True, 0),  # answer n belongs to frames 2 n and 2 n + 1
    (lambda c: c.roll(-1, 1), False, 1),
]


@pytest.mark.parametrize(("answers", "is_causal", "look_ahead"), CASES)
def test_who_looks_ahead_is_found(answers: Callable[[Tensor], Tensor], is_causal: bool, look_ahead: int) -> None:
    torch.manual_seed(0)
    found = poison(answers, clip())
    assert (found.is_causal, found.look_ahead_frames) == (is_causal, look_ahead)


class OnePerClip(nn.Module):
    def __init__(self, num_seen: int) -> None:
        super().__init__()
        self.num_seen = num_seen

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return clip_BTCHW[:, : self.num_seen].mean((1, 3, 4))


def test_one_answer_for_a_clip_is_late_for_all_but_its_last_frame() -> None:
    found = find_causality(forms_of(OnePerClip(8), num_frames=8, answer_every=2), clip())
    assert (found.is_causal, found.num_answers, found.look_ahead_frames) == (False, 1, 7)
    found = find_causality(forms_of(OnePerClip(1), num_frames=8, answer_every=2), clip())
    assert found.is_causal


@pytest.mark.parametrize("layer", [Conv3d(3, 2, 3, padding=1), CausalConv3d(3, 2, 3, padding=1)])
def test_one_frame_shows_nothing_so_it_is_repeated(layer: nn.Module) -> None:
    model = nn.Module()
    model.forward = model.answers = layer.forward  # type: ignore[assignment,method-assign]
    found = find_causality(forms_of(model, num_frames=1, answer_every=1), clip(1))
    assert (found.is_causal, found.num_frames) == (isinstance(layer, CausalConv3d), 2)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_net_with_strides_is_given_a_longer_clip(is_causal: bool) -> None:
    """I3D has one answer for 16 frames, and another where the clip is longer: then poisoning tells."""
    torch.manual_seed(0)
    net = I3D(5, width=1 / 16, is_causal=is_causal).eval()
    found = find_causality(forms_of(net, num_frames=16, answer_every=8), torch.rand(1, 16, 3, 32, 32) - 0.5)
    assert found.is_causal is is_causal
    assert found.num_answers >= 2
    assert found.num_frames == (16 if is_causal else 32)
