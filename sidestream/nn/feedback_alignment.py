"""Feedback alignment: linear and convolution layers that send errors back over fixed random weights.

Lillicrap et al., "Random synaptic feedback weights support error backpropagation for deep learning", Nature
Communications 2016. Forward, and the gradients of weights and biases, are ordinary; in the gradient of the input a
fixed random B stands where W would:

    y = x W^T + b        dL/dW = (dL/dy)^T x        dL/db = sum of dL/dy        "dL/dx" = (dL/dy) B

and the same for convolutions. Each layer is one operator to ``torch.export``, so a cut model keeps its feedback.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestream.errors import InputError
from sidestream.nn.conv3d import CausalConv3d, Conv3d
from sidestream.nn.feedback_ops import convolve, project
from sidestream.nn.feedback_weights import Draw

BUFFER = "feedback_weight"
WITHOUT = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear, Conv3d, CausalConv3d)
"""Layers with weights of their own over which errors go back in other ways."""


def with_random_feedback(
    module: nn.Module, *, seed: int = 0, distribution: str = "uniform", scale: float | None = None
) -> nn.Module:
    """``module`` itself, its linear and convolution layers (transposed ones too) with fixed random backward weights.

    Forward does not change, nor do parameters and ``state_dict``: the backward weights are buffers
    ``feedback_weight`` that are not saved but drawn from ``seed`` and the layer's name, so the same call makes the
    same ones. A second call draws new ones. ``without_random_feedback`` undoes it.

    ``distribution`` and ``scale``: uniform in +-scale, or normal with that standard deviation; None is 1 / sqrt(n)
    with the n outputs that an input of the layer goes to (Nøkland's bound). How large Lillicrap et al. drew them for
    which task is not known to us.

    Norms and whatever else has no matrix keep their own backward. Raises ``InputError``, naming the layer, for
    attention, recurrent and sliding layers, subclasses of the layers above, and modules without any such layer.
    """
    draw = Draw(seed, distribution, scale)
    layers = _layers(module)
    for path, layer in layers.items():
        weight = layer.weight
        feedback = draw(path, weight.shape, _num_outputs_of_an_input(layer), weight)
        if isinstance(layer, _Fed):
            layer.feedback_weight = feedback
        else:
            layer.__class__ = _FED[type(layer)]
            layer.register_buffer(BUFFER, feedback, persistent=False)
    return module


def without_random_feedback(module: nn.Module) -> nn.Module:
    """``module`` itself, its layers with their own backward again."""
    for layer in _fed_layers(module).values():
        layer.__class__ = next(plain for plain, fed in _FED.items() if type(layer) is fed)
        delattr(layer, BUFFER)
    return module


@contextmanager
def own_feedback(module: nn.Module) -> Iterator[None]:
    """Inside, errors go back over the layers' own weights, as in backpropagation (stages that were cut excepted)."""
    fed = _fed_layers(module)
    for layer in fed.values():
        layer.__class__ = next(plain for plain, by in _FED.items() if type(layer) is by)
    try:
        yield
    finally:
        for layer in fed.values():
            layer.__class__ = _FED[type(layer)]


def alignment_degrees(module: nn.Module) -> dict[str, float]:
    """The angle between each layer's own and its backward weights: 90 for unrelated ones, smaller where it aligns."""
    angles = {}
    for path, layer in _fed_layers(module).items():
        cosine = F.cosine_similarity(layer.weight.detach().flatten(), layer.feedback_weight.flatten(), dim=0)
        angles[path] = math.degrees(math.acos(min(1.0, max(-1.0, float(cosine)))))
    return angles


class _Fed:
    """What the layers with feedback weights have in common."""

    feedback_weight: Tensor

    def _cast(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Input, weights, bias and feedback weights, in the type that autocast asks for."""
        given = (x, self.weight, self.bias, self.feedback_weight)
        if not torch.is_autocast_enabled(x.device.type):
            return given
        dtype = torch.get_autocast_dtype(x.device.type)
        return tuple(None if each is None else each.to(dtype) for each in given)  # type: ignore[return-value]


class _FedLinear(_Fed, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return project(*self._cast(input))


class _FedConvolution(_Fed):
    def forward(self: Any, input: Tensor) -> Tensor:
        x, weight, bias, feedback = self._cast(input)
        padding = [0] * len(self.kernel_size) if isinstance(self.padding, str) else list(self.padding)
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, self.padding_mode), [0] * len(padding)
        elif self.padding == "same":  # one more behind than before, where the sum is odd
            sums = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            padding = [total // 2 for total in sums]
            if any(total % 2 for total in sums):
                x = F.pad(x, [n for total in reversed(sums) for n in (0, total % 2)])
        geometry: Any = (list(self.stride), padding, list(self.dilation), False, [0] * len(padding), self.groups)
        return convolve(x, weight, bias, feedback, *geometry)


class _FedTransposed(_Fed):
    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        num_axes = len(self.kernel_size)
        more = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, num_axes, self.dilation
        )
        geometry: Any = (list(self.stride), list(self.padding), list(self.dilation), True, list(more), self.groups)
        return convolve(*self._cast(input), *geometry)


class _FedConv1d(_FedConvolution, nn.Conv1d): ...


class _FedConv2d(_FedConvolution, nn.Conv2d): ...


class _FedConv3d(_FedConvolution, nn.Conv3d): ...


class _FedConvTranspose1d(_FedTransposed, nn.ConvTranspose1d): ...


class _FedConvTranspose2d(_FedTransposed, nn.ConvTranspose2d): ...


class _FedConvTranspose3d(_FedTransposed, nn.ConvTranspose3d): ...


_FED: dict[type[nn.Module], type[Any]] = {
    nn.Linear: _FedLinear,
    nn.Conv1d: _FedConv1d,
    nn.Conv2d: _FedConv2d,
    nn.Conv3d: _FedConv3d,
    nn.ConvTranspose1d: _FedConvTranspose1d,
    nn.ConvTranspose2d: _FedConvTranspose2d,
    nn.ConvTranspose3d: _FedConvTranspose3d,
}
KINDS = tuple(_FED)


def _layers(module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, layer in module.named_modules():
        where = f"layer {path!r} ({type(layer).__name__})" if path else f"a {type(layer).__name__}"
        if isinstance(layer, WITHOUT):
            raise InputError(
                f"{where} has no form with random feedback weights; there is one of nn.Linear, nn.Conv1d to nn.Conv3d "
                "and nn.ConvTranspose1d to nn.ConvTranspose3d: make the net of those, or keep its own feedback"
            )
        if not isinstance(layer, KINDS):
            continue
        if type(layer) not in _FED and not isinstance(layer, _Fed):
            raise InputError(
                f"{where} is a layer of its own kind, derived from {_base(layer)}, whose backward is not known; "
                "random feedback takes the layers of torch.nn themselves"
            )
        found[path] = layer
    if not found:
        raise InputError(f"{type(module).__name__} has no linear or convolution layer to give feedback weights to")
    return found


def _fed_layers(module: nn.Module) -> dict[str, Any]:
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, _Fed)}


def _base(layer: nn.Module) -> str:
    return next(kind.__name__ for kind in KINDS if isinstance(layer, kind))


def _num_outputs_of_an_input(layer: Any) -> int:
    """The products in which one input takes part: those that its error is the sum of (at stride 1)."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.out_channels // layer.groups * math.prod(layer.kernel_size)
