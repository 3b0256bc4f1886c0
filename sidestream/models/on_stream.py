"""Any clip model on a stream: its own streaming form where it has one, otherwise a sliding window."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from sidestream.models.info import ModelInfo
from sidestream.nn.combine import Chain, PerFrame
from sidestream.nn.pool import Newest
from sidestream.nn.sliding import SlidingWindow
from sidestream.nn.steppable import Steppable


def on_stream(model: nn.Module, info: ModelInfo, *, period_ticks: int | None = None) -> tuple[Chain, ModelInfo]:
    """``model``, which reads ``clip_BTCHW``, as a chain of streaming layers that is fed one frame at a time.

    A model that was made for every n-th frame (``InputSpec.frame_step``) is fed every n-th of the stream. One without
    ``streaming()`` reads the newest ``InputSpec.num_frames`` of those again for each answer, ``period_ticks`` (of
    those) apart; default: half of its frames. Gives the chain and its info, whose spec is that of a frame.
    """
    spec = info.input_spec
    if hasattr(model, "streaming"):
        layer: Steppable = model.streaming()  # type: ignore[operator]
    else:
        layer = SlidingWindow(model, spec.num_frames, period_ticks=period_ticks or max(1, spec.num_frames // 2))
    layers = layer.layers if isinstance(layer, Chain) else (layer,)
    every = (Newest(spec.frame_step),) if spec.frame_step > 1 else ()
    chain = Chain(*every, *layers).train(model.training)
    fed = spec.replace(layout="BCHW", num_frames=1, min_frames=None, frame_step=1, delay_ticks=chain.delay_ticks)
    return chain, replace(info, input_spec=fed)


def net_on_stream(model: nn.Module, info: ModelInfo) -> tuple[nn.Module, ModelInfo]:
    """Any model made by name as it is cut and fed one frame at a time, and its info.

    A frame model is that already; a clip model is its chain, and one that looks at each frame by itself the net on
    frames inside of it, which can be cut anywhere.
    """
    if info.input_spec.layout != "BTCHW":
        return model, info
    chain, info = on_stream(model, info)
    if len(chain.layers) == 1 and isinstance(frames := chain.layers[0], PerFrame):
        return frames.module, info
    return chain, info


def shortest(model: nn.Module, info: ModelInfo) -> int:
    """Frames of the shortest stream to which ``model`` gives an answer: a window is filled up, other clips are not."""
    spec = info.input_spec
    if spec.layout != "BTCHW" or not hasattr(model, "streaming"):
        return 1
    return ((spec.min_frames or spec.num_frames) - 1) * spec.frame_step + 1
