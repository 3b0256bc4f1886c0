"""Clip models on streams: their own step form, or a sliding window, on every n-th frame where they were made for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sidestream.models import create_model, info_of
from sidestream.models.info import ModelInfo
from sidestream.models.on_stream import on_stream
from sidestream.nn.steppable import step_through
from sidestream.types import InputSpec


def random_clip(num_frames: int) -> Tensor:
    return torch.randn(1, num_frames, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Spread(nn.Module):
    """A clip model without a streaming form."""

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return clip_BTCHW.std(1).mean((2, 3)) * clip_BTCHW.shape[1]


@torch.no_grad()
def test_the_models_own_form_on_every_nth_frame() -> None:
    model = create_model("tsm_mobilenet_v2_online", num_classes=5)
    info = info_of(model)
    assert info is not None
    assert info.input_spec.frame_step == 8
    chain, fed = on_stream(model, info)
    clip = random_clip(20)
    answers, _ = step_through(chain, clip, and_finish=True)
    assert torch.allclose(answers, model.answers(clip[:, ::8]), atol=1e-5)
    assert (fed.input_spec.layout, fed.input_spec.num_frames, fed.input_spec.frame_step) == ("BCHW", 1, 1)
    assert chain.period_ticks == 8


def test_a_window_that_slides_over_every_nth_frame() -> None:
    spec = InputSpec(layout="BTCHW", num_frames=4, frame_step=2, causal=False)
    chain, fed = on_stream(Spread(), ModelInfo("spread", "sidestream", "clip", spec, 3))
    clip = random_clip(13)
    answers, _ = step_through(chain, clip)
    kept = clip[:, ::2]  # frames 0, 2, ... 12: seven of them, an answer at every second
    for n, newest in enumerate((0, 2, 4, 6)):
        window = kept[:, [max(0, newest - back) for back in (3, 2, 1, 0)]]
        assert torch.equal(answers[:, n], Spread()(window))
    assert answers.shape[1] == 4
    assert chain.period_ticks == 4
    assert fed.input_spec.layout == "BCHW"
