"""Gradients of a recurrent layer that go forward in time, frame by frame: RTRL, and what it shares with UORO.

    learner = RTRL(GRU(3, 8), mse_loss, readout=nn.Linear(8, 1))
    for frame_BD, target_B1 in stream:
        loss = learner.step(frame_BD, target_B1)       # of earlier frames, only the state and its influence are kept
        learner.assign_gradients()
        optimizer.step()
        learner.zero_gradients()

    s_t, y_t = layer(x_t, s_(t-1))                     state and answer; all derivatives by torch.func, of any layer
    P_t = ds_t/ds_(t-1) P_(t-1) + ds_t/dw              the influence of the weights w on the state
    gradient_t = dl_t/dy_t (dy_t/dw + dy_t/ds_(t-1) P_(t-1))

RTRL (Williams and Zipser, 1989) keeps P, one per stream: state size x number of weights. UORO (uoro.py) keeps two
vectors per stream whose outer product has P as its mean. With weights that do not move, the gradients summed up to t
are those of backprop through time. In names, X stands for the axes of a frame, S for the state as a vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vjp, vmap
from torch.utils import _pytree as pytree

from sidestream.errors import InputError, ModelError
from sidestream.nn.steppable import Steppable
from sidestream.types import NOTHING

Gradients = dict[str, Tensor]
Loss = Callable[[Tensor, Any], Tensor]


class StreamStep(nn.Module):
    """``layer.step`` of one stream, without a batch axis and with its state as one vector (S numbers)."""

    def __init__(self, layer: Steppable, frame_BX: Tensor) -> None:
        super().__init__()
        self.layer = layer
        leaves, self._spec = pytree.tree_flatten(layer.init_state(frame_BX[:1]))
        if not leaves or not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
            raise ModelError(
                f"the state of {type(layer).__name__} holds {[type(leaf).__name__ for leaf in leaves]}; a forward "
                "gradient needs a state of floating-point tensors, as recurrent layers have"
            )
        self._shapes = [leaf.shape for leaf in leaves]
        self.start_S = torch.cat([leaf.detach().flatten() for leaf in leaves])

    def forward(self, frame_X: Tensor, state_S: Tensor) -> tuple[Tensor, Tensor]:
        parts = state_S.split([shape.numel() for shape in self._shapes])
        leaves = [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
        answer, state = self.layer.step(frame_X.unsqueeze(0), pytree.tree_unflatten(leaves, self._spec))
        if answer is NOTHING:
            raise ModelError(f"{type(self.layer).__name__} swallows frames; a forward gradient needs an answer to each")
        return answer.squeeze(0), torch.cat([leaf.flatten() for leaf in pytree.tree_leaves(state)])


class ForwardGradient(ABC):
    """Learns a layer on B parallel streams, frame by frame. ``layer``: a ``Steppable`` that answers every frame.

    ``loss(answer, target)``: a scalar of all B streams. ``readout``: a module without memory between the layer's
    answer and the loss, trained by its ordinary gradient. Gradients add up, over frames and streams, until
    ``zero_gradients``; their names start with "layer." and "readout.". Parameters that do not require a gradient get
    none. Where the weights move between frames, the influence mixes that of old weights, as in the papers. Streams
    must not meet in the layer: it is run stream by stream (vmap), so it holds no batch statistics, and dropout only at
    rate 0.
    """

    def __init__(self, layer: Steppable, loss: Loss, *, readout: nn.Module | None = None) -> None:
        self._layer, self._readout, self._loss = layer, readout or nn.Identity(), loss
        self.reset()
        self.zero_gradients()

    def reset(self) -> None:
        """The streams start anew: state and influence are forgotten, gradients stay."""
        self._stream: StreamStep | None = None
        self._state_BS: Tensor = torch.empty(0)
        self.answer: Tensor | None = None
        """Of the readout, to the last frame."""

    def step(self, frame_BX: Tensor, target: Any = None) -> Tensor | None:
        """One frame of all streams: its loss, whose gradient is added. Without a target: None, and state only."""
        if self._stream is None:
            self._stream = StreamStep(self._layer, frame_BX)
            self._state_BS = self._stream.start_S.expand(len(frame_BX), -1)
            self._start(len(frame_BX))
        if len(frame_BX) != len(self._state_BS):
            raise InputError(f"a frame of {len(frame_BX)} streams after {len(self._state_BS)}; call reset() between")
        weights = {name: p.detach() for name, p in self._stream.named_parameters() if p.requires_grad}
        frame_BX = frame_BX.detach()

        def answer_and_state(frame_X: Tensor, state_S: Tensor) -> tuple[Tensor, Tensor]:
            return vjp(lambda s: self._call(weights, frame_X, s), state_S)[0]  # fused cells have no batching rule

        answer_BX, next_BS = vmap(answer_and_state)(frame_BX, self._state_BS)
        loss = self._learn(weights, frame_BX, answer_BX, target)
        self._advance(weights, frame_BX)
        self._state_BS = next_BS
        return loss

    def gradients(self) -> Gradients:
        """By name, summed since ``zero_gradients``."""
        return dict(self._gradients)

    def zero_gradients(self) -> None:
        self._gradients: Gradients = {}

    def assign_gradients(self) -> None:
        """Put them into ``parameter.grad``, for an optimiser."""
        for prefix, module in (("layer", self._layer), ("readout", self._readout)):
            for name, parameter in module.named_parameters():
                parameter.grad = self._gradients.get(f"{prefix}.{name}")

    def _call(self, weights: Gradients, frame_X: Tensor, state_S: Tensor) -> tuple[Tensor, Tensor]:
        return functional_call(self._stream, weights, (frame_X, state_S))  # type: ignore[arg-type]

    def _learn(self, weights: Gradients, frame_BX: Tensor, answer_BX: Tensor, target: Any) -> Tensor | None:
        with torch.enable_grad():
            answer_BX = answer_BX.detach().requires_grad_()
            read = self._readout(answer_BX)
            self.answer = read.detach()
            if target is None:
                return None
            loss = self._loss(read, target)
        ours = {f"readout.{name}": p for name, p in self._readout.named_parameters() if p.requires_grad}
        cotangent_BX, *found = torch.autograd.grad(loss, [answer_BX, *ours.values()], materialize_grads=True)

        def pull(frame_X: Tensor, state_S: Tensor, cotangent_X: Tensor) -> tuple[Gradients, Tensor]:
            _, back = vjp(lambda w, s: self._call(w, frame_X, s)[0], weights, state_S)  # type: ignore[misc]
            return back(cotangent_X)

        direct_B, back_BS = vmap(pull)(frame_BX, self._state_BS, cotangent_BX)
        through = self._through_state(back_BS)
        self._add({name: g_B.sum(0) + through[name] for name, g_B in direct_B.items()})
        self._add(dict(zip(ours, found, strict=True)))
        return loss.detach()

    def _add(self, gradients: Gradients) -> None:
        for name, g in gradients.items():
            self._gradients[name] = self._gradients[name] + g if name in self._gradients else g.clone()

    @abstractmethod
    def _start(self, num_streams: int) -> None:
        """The weights have no influence on the first state."""

    @abstractmethod
    def _through_state(self, cotangent_BS: Tensor) -> Gradients:
        """Cotangents of the state before this frame, times its influence, summed over streams."""

    @abstractmethod
    def _advance(self, weights: Gradients, frame_BX: Tensor) -> None:
        """The influence one frame on, from ``self._state_BS``."""


class RTRL(ForwardGradient):
    """Real-time recurrent learning, exact. Memory: B x S x weights numbers; work: about S backward passes a frame."""

    def _start(self, num_streams: int) -> None:
        assert self._stream is not None
        named = [(name, p) for name, p in self._stream.named_parameters() if p.requires_grad]
        size = (num_streams, len(self._stream.start_S))
        self._influence_BS = {name: p.new_zeros(*size, *p.shape) for name, p in named}

    def _through_state(self, cotangent_BS: Tensor) -> Gradients:
        return {name: torch.einsum("bs,bs...->...", cotangent_BS, P) for name, P in self._influence_BS.items()}

    def _advance(self, weights: Gradients, frame_BX: Tensor) -> None:
        def one(frame_X: Tensor, state_S: Tensor, influence_S: Gradients) -> Gradients:
            by_weight, by_state_SS = jacrev(lambda w, s: self._call(w, frame_X, s)[1], argnums=(0, 1))(weights, state_S)
            return {
                name: direct + torch.tensordot(by_state_SS, influence_S[name], 1) for name, direct in by_weight.items()
            }

        self._influence_BS = vmap(one)(frame_BX, self._state_BS, self._influence_BS)
