"""``LayeredDense``: the size of frames is checked on clips and on a stream, and the check is no layer of the net."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sidestream.circuit.cut import cut
from sidestream.circuit.wiring import wire
from sidestream.engine import run
from sidestream.errors import LayoutError
from sidestream.models import create_model


@pytest.mark.parametrize(("name", "multiple"), [("keypoint_cnn", 16), ("conv_autoencoder", None)])
def test_frames_of_a_wrong_size_are_refused_on_clips_and_streams(name: str, multiple: int | None) -> None:
    net: Any = create_model(name)
    multiple = multiple or net.multiple_px
    stream = net.streaming()
    for height, width in ((3 * multiple - 1, 2 * multiple), (2 * multiple, 3 * multiple + 1)):
        frame_BCHW = torch.rand(1, 3, height, width)
        message = f"frames of {height} x {width} px; it takes multiples of {multiple}: resize or crop them"
        with pytest.raises(LayoutError, match=message):
            net(frame_BCHW[:, None])
        with pytest.raises(LayoutError, match=message):
            stream.step(frame_BCHW, (None,))
        with pytest.raises(LayoutError, match=message):
            stream(frame_BCHW[:, None])
    frame_BCHW = torch.rand(1, 3, 3 * multiple, 2 * multiple)
    with torch.no_grad():
        assert torch.equal(stream.step(frame_BCHW, (None,))[0], net(frame_BCHW[:, None])[:, 0])


def test_the_layers_are_as_without_the_check() -> None:
    """Keys of weights, stages of depth-parallel training, answers of the net in 8 stages: of the layers alone."""
    torch.manual_seed(0)
    net: Any = create_model("keypoint_cnn", num_classes=3)
    assert [type(m).__name__ for m in net.depth_modules()] == ["Sequential"] * 8
    assert next(iter(net.state_dict())) == "net.conv1.0.weight"
    assert not any("check" in key for key in net.state_dict())
    clip_BTCHW = torch.rand(1, 2, 3, 32, 48)
    with torch.no_grad():
        wanted = net(clip_BTCHW)
        for t, frame_BCHW in enumerate(clip_BTCHW.unbind(1)):
            made = frame_BCHW
            for layer in net.depth_modules():
                made = layer(made)
            assert torch.equal(made, net.streaming().step(frame_BCHW, (None,))[0])
            assert torch.allclose(made, wanted[:, t], atol=1e-6)
        circuit = wire(cut(net.net, clip_BTCHW[:, 0], num_stages=8), "pipelined")
        answers = [out.value for out in run(circuit, list(clip_BTCHW.unbind(1)), executor="inline")]
    assert len(answers) == 2
    for t, answer in enumerate(answers):
        assert torch.allclose(answer, wanted[:, t], atol=1e-6)
