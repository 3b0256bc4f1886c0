"""Backprop as diffusion: neurons with a delayed response, forward and backward waves at once, as a small simulator.

Betti and Gori, "Backprop Diffusion is Biologically Plausible", arXiv 1912.04635. From its abstract we know: neurons
respond with a time delay, the weight update of backprop is then made of a forward and a backward wave, and it comes
close to the gradient where the input is not too fast for the depth of the net. The equations below are our reading of
that, not the paper's text. With layers f_1 .. f_K, a time constant tau in ticks, and alpha = 1 / tau:

    tick t:   in_1 = x^t,   in_l = a_(l-1) of tick t - 1                   the forward wave moves on by one layer
              a_l += alpha (f_l(in_l) - a_l)                              the activation is late: a first-order lag
              d_K = dloss/da_K                                            the error comes in at the top, at once
              d_l += alpha (d_(l+1) . df_(l+1)/din - d_l)                 the backward wave, of what was there at t - 1
              pseudo-gradient_l = d_l . df_l/dw_l at in_l of this tick    nothing is kept

With tau = 1 the lag is a pure delay of one tick per layer, and this is the Sideways rule on a pipelined circuit. In
the mean an input takes tau ticks through a layer, so layer l works on an input that is 2 (K - l) tau + tau - 1 ticks
newer than its error. A finer step in time: give every frame several times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.errors import InputError

Gradients = dict[str, Tensor]
Loss = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Waves:
    """All that there is between two ticks, one entry per layer; None where a wave has not come yet (at rest: 0)."""

    activations: tuple[Tensor | None, ...]
    """Of the output of each layer."""
    errors: tuple[Tensor | None, ...]
    """At the output of each layer; the last layer's is made anew in every tick."""
    sent: tuple[Tensor | None, ...]
    """What the layer above has sent back to each layer."""


@dataclass(frozen=True)
class DiffusionTick:
    """What one tick gives."""

    answer: Tensor | None
    """Activation of the last layer, once the forward wave is there."""
    loss: Tensor | None
    gradients: tuple[Gradients | None, ...]
    """Pseudo-gradient of each layer, by name of the parameter; None before the backward wave is there."""
    waves: Waves


def at_rest(num_layers: int) -> Waves:
    """Before the first frame."""
    nothing = (None,) * num_layers
    return Waves(nothing, nothing, nothing)


def diffuse(
    layers: Sequence[nn.Module], loss: Loss, frame: Tensor, target: Any, waves: Waves, *, time_constant: float = 1.0
) -> DiffusionTick:
    """One tick of both waves. ``target``: for what the last layer says in this tick; None: no error comes in."""
    if time_constant < 1:
        raise InputError(f"{time_constant = }; expected 1 (a pure delay of one tick) or more")
    inputs = (frame, *waves.activations[:-1])
    driven = [None if x is None else _drive(layer, x) for layer, x in zip(layers, inputs, strict=True)]
    activations = [
        old if one is None else _towards(old, one[1].detach(), time_constant)
        for one, old in zip(driven, waves.activations, strict=True)
    ]
    errors = [
        old if news is None else _towards(old, news, time_constant)
        for news, old in zip(waves.sent, waves.errors, strict=True)
    ]
    value, errors[-1] = _error(loss, activations[-1], target)
    gradients: list[Gradients | None] = [None] * len(layers)
    sent: list[Tensor | None] = [None] * len(layers)
    for n, (layer, one, error) in enumerate(zip(layers, driven, errors, strict=True)):
        if one is not None and error is not None:
            gradients[n], back = _pull(layer, *one, error)
            if n:
                sent[n - 1] = back
    return DiffusionTick(
        activations[-1], value, tuple(gradients), Waves(tuple(activations), tuple(errors), tuple(sent))
    )


def diffusion(
    layers: Sequence[nn.Module],
    loss: Loss,
    pairs: Iterable[tuple[Tensor, Any]],
    *,
    time_constant: float = 1.0,
    target_delay: int | None = None,
) -> Iterator[DiffusionTick]:
    """One tick per pair (frame, target), from rest. Weights may be changed between ticks.

    ``target_delay``: ticks by which targets wait for the forward wave; by default its mean delay, K tau - 1 rounded,
    which for tau = 1 makes the target that of the frame that is answered.
    """
    waves, waiting = at_rest(len(layers)), []
    delay = round(len(layers) * time_constant) - 1 if target_delay is None else target_delay
    for frame, target in pairs:
        waiting.append(target)
        due = waiting.pop(0) if len(waiting) > delay else None
        tick = diffuse(layers, loss, frame, due, waves, time_constant=time_constant)
        waves = tick.waves
        yield tick


def _drive(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The input and what the layer makes of it, ready to go back."""
    with torch.enable_grad():
        x = x.detach()
        if x.is_floating_point():
            x.requires_grad_()
        return x, layer(x)


def _towards(old: Tensor | None, goal: Tensor, time_constant: float) -> Tensor:
    if time_constant == 1:
        return goal
    return goal / time_constant if old is None else old + (goal - old) / time_constant


def _error(loss: Loss, answer: Tensor | None, target: Any) -> tuple[Tensor | None, Tensor | None]:
    if answer is None or target is None:
        return None, None
    with torch.enable_grad():
        answer = answer.detach().requires_grad_()
        value = loss(answer, target)
        return value.detach(), torch.autograd.grad(value, answer)[0]


def _pull(layer: nn.Module, x: Tensor, out: Tensor, error: Tensor) -> tuple[Gradients, Tensor | None]:
    """The vector-Jacobian product at x: for the parameters, and for the layer below."""
    named = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    wanted = [*named.values(), *([x] if x.requires_grad else [])]
    if not wanted or not out.requires_grad:
        return {}, None
    found = torch.autograd.grad(out, wanted, error, allow_unused=True, materialize_grads=True)
    return dict(zip(named, found)), found[-1] if x.requires_grad else None
