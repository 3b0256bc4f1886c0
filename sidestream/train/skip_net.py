"""A net of layers with skip wires: each layer also reads the layer before the last, whose frame is one newer.

This is the circuit of Skip-Sideways (Malinowski et al., CVPR 2021) as a model that clips can be put through: to be
evaluated, to be trained by backprop through time, and to be trained by depth (``SkipNet.circuit``). Answer s of a clip
is about frame s, and sees newer ones too, over the skips; past the end of the clip its last frame is repeated:

    h_1[s] = f_1(frame[s])    h_2[s] = f_2(h_1[s])    h_i[s] = f_i(h_(i-1)[s], h_(i-2)[s + 1])    answer[s] = h_K[s]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.circuit.build_stages import SKIPS, stages_of, widened
from sidestream.circuit.wire import Circuit
from sidestream.circuit.wiring import parallel
from sidestream.errors import InputError
from sidestream.models import info_of
from sidestream.models.clip_layout import check_clip
from sidestream.models.info import attach_info


def with_skips(model: nn.Module, frame_BCHW: Tensor, skips: str) -> nn.Module:
    """``model`` with skip wires between its layers, which are its own (``model`` itself for "none").

    ``skips``: how a layer joins what it reads: "add", "concat" or "projection", see ``stages_of``. For "concat" the
    layers are given wider first weights in place, so ``model`` is of no use by itself afterwards.
    ``frame_BCHW``: of the size that it will be trained on. To load weights, make the model anew, give it skips, and
    load them into that. Raises ``InputError`` for models without ``depth_modules()``, with fewer than three of them,
    and for shapes that do not fit.
    """
    if skips == "none" or isinstance(model, SkipNet):
        return model
    modules: Any = getattr(model, "depth_modules", None)
    if skips not in SKIPS or modules is None:
        raise InputError(
            f"{skips = } on {type(model).__name__}: skips are {', '.join(SKIPS)}, and need a model that says what its "
            "layers are (depth_modules()), such as vgg8 or simple_cnn"
        )
    layers = modules()
    if len(layers) < 3:
        raise InputError(f"{type(model).__name__} has {len(layers)} layers; the first skip is that of the third")
    if skips == "concat":
        layers = _all_widened(layers, frame_BCHW)
    net = SkipNet(layers, frame_BCHW, skips).train(model.training)
    if (own := info_of(model)) is not None:
        attach_info(net, replace(own, name=f"{own.name}, skips {skips}"))
    return net


class SkipNet(nn.Module):
    """``clip_BTCHW`` -> logits (B, num_classes), the mean over the answers. Frames of one size only."""

    def __init__(self, layers: Sequence[nn.Module], frame_BCHW: Tensor, skips: str) -> None:
        super().__init__()
        self._stages = stages_of(layers, frame_BCHW, skips=skips, name=f"skips {skips}")
        self.layers = nn.ModuleList([stage.module for stage in self._stages])

    def circuit(self) -> Circuit:
        """The net on a stream, every layer a stage; parameters are shared."""
        return parallel(self._stages)

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self.answers(clip_BTCHW).mean(1)

    def answers(self, clip_BTCHW: Tensor) -> Tensor:
        """Logits (B, T, num_classes), one for each frame: the answers of ``circuit()``, all layers on all frames."""
        check_clip("the net", clip_BTCHW)
        lengths = _lengths(len(self.layers), clip_BTCHW.shape[1])
        repeated = clip_BTCHW[:, -1:].expand(-1, lengths[0] - clip_BTCHW.shape[1], -1, -1, -1)
        made = [torch.cat([clip_BTCHW, repeated], 1)]
        for number, (layer, length) in enumerate(zip(self.layers, lengths, strict=True), start=1):
            trunk = made[-1][:, :length]
            inputs = (trunk,) if number < 3 else (trunk, made[-2][:, 1 : length + 1])
            answers = layer(*(each.flatten(0, 1) for each in inputs))
            made.append(answers.unflatten(0, trunk.shape[:2]))
        return made[-1]


def _lengths(num_layers: int, num_frames: int) -> list[int]:
    """Values of each layer that the T answers need: its successor's, or one more than its skip's reader's."""
    lengths = [num_frames] * (num_layers + 2)
    for n in reversed(range(num_layers - 2)):
        lengths[n] = max(lengths[n + 1], lengths[n + 2] + 1)
    return lengths[:num_layers]


@torch.no_grad()
def _all_widened(layers: Sequence[nn.Module], frame_BCHW: Tensor) -> list[nn.Module]:
    """From the third on, each layer takes the channels of the layer before the last too."""
    modes = [(m, m.training) for layer in layers for m in layer.modules()]
    for m, _ in modes:
        m.training = False
    made = [frame_BCHW]
    for layer in layers:
        made.append(layer(made[-1]))
    for m, mode in modes:
        m.training = mode
    return [*layers[:2], *(widened(layer, made[n].shape[1]) for n, layer in enumerate(layers[2:], start=1))]
