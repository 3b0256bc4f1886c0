"""The stages of a net that is trained by depth: one per layer where it says which they are, else cut by cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.cut import cut
from sidestream.circuit.stage import Stages
from sidestream.circuit.wire import Circuit
from sidestream.circuit.wiring import pipelined
from sidestream.errors import InputError
from sidestream.models import info_of
from sidestream.nn.combine import Chain, PerFrame
from sidestream.train.skip_net import SkipNet

NUM_STAGES = 4


def circuit_of(model: nn.Module, frame_BCHW: Tensor, num_stages: int | None = None) -> tuple[Circuit, bool]:
    """``model`` as a circuit whose stages work side by side, and whether it takes batches of any size.

    A net with ``depth_modules()`` has one stage per module, and a ``SkipNet`` its own circuit; every other net that
    reads single frames is cut into ``num_stages`` stages of equal cost (by operations, so that a resumed run cuts at
    the same places), which take batches of the size of ``frame_BCHW`` only. The parameters are the model's own.
    Raises ``InputError`` for models that are not frame by frame, and for a single stage.
    """
    if isinstance(model, SkipNet):
        return model.circuit(), True
    modules: Any = getattr(model, "depth_modules", None)
    if modules is not None and num_stages is None:
        layers = modules()
        check_depth(len(layers), model)
        return pipelined(stages_of(layers, frame_BCHW, name=type(model).__name__)), True
    net = frame_net(model)
    was_training = net.training
    with torch.no_grad():
        stages: Stages = cut(net.train(), frame_BCHW, num_stages=num_stages or NUM_STAGES, costs="flops")
    net.train(was_training)
    return pipelined(stages), False


def frame_net(model: nn.Module) -> nn.Module:
    """The part of ``model`` that reads one frame at a time. Raises ``InputError``, with the reason, for others."""
    name, info = type(model).__name__, info_of(model)
    if info is not None and info.input_spec.layout == "BCHW":
        return model
    advice = "train it with the rule 'backprop'"
    if not hasattr(model, "streaming"):
        raise InputError(f"{name} reads whole clips at once, so it cannot be trained frame by frame; {advice}")
    chain: Any = model.streaming()  # type: ignore[operator]
    layers = chain.layers if isinstance(chain, Chain) else (chain,)
    if not all(isinstance(layer, PerFrame) for layer in layers):
        kinds = sorted({type(layer).__name__ for layer in layers if not isinstance(layer, PerFrame)})
        raise InputError(
            f"the stream of {name} carries a state from frame to frame ({', '.join(kinds)}), which no gradient of a "
            f"depth-parallel rule crosses; {advice}, or take a net that works frame by frame"
        )
    modules: list[Any] = [layer.module for layer in layers]
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def check_depth(num_stages: int, model: nn.Module) -> None:
    """Raises ``InputError`` for a single stage."""
    if num_stages < 2:
        raise InputError(
            f"{type(model).__name__} has {num_stages} stage; depth-parallel training needs 2 or more: give a deeper "
            "net, or use the rule 'backprop'"
        )
