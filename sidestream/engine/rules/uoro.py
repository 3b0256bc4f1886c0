"""UORO: forward gradients that are right in the mean, from two vectors per stream.

Tallec and Ollivier, "Unbiased Online Recurrent Optimization", arXiv 1702.05043, algorithm 1. With random signs n, and
scales p, q that keep the two vectors of one size:

    s~ = p ds_t/ds_(t-1) s~ + q n                      a tangent of the state
    w~ = w~ / p + (n . ds_t/dw) / q                    a cotangent of the weights; the mean of s~ w~ is the influence
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap

from sidestream.engine.rules.forward_gradient import ForwardGradient, Gradients, Loss
from sidestream.nn.steppable import Steppable


class UORO(ForwardGradient):
    """Its influence is one outer product per stream, right in the mean: B x (S + weights) numbers, three passes.

    Differs from the paper: exact tangents (jvp) for its difference quotient. ``epsilon`` keeps its scales away from 0.
    ``seed``: of the random signs. Every stream and frame draws its own.
    """

    def __init__(
        self, layer: Steppable, loss: Loss, *, readout: nn.Module | None = None, seed: int = 0, epsilon: float = 1e-7
    ) -> None:
        super().__init__(layer, loss, readout=readout)
        self._generator, self._epsilon = torch.Generator().manual_seed(seed), epsilon

    def _start(self, num_streams: int) -> None:
        assert self._stream is not None
        self._tangent_BS = torch.zeros_like(self._state_BS)
        named = [(name, p) for name, p in self._stream.named_parameters() if p.requires_grad]
        self._cotangent_B = {name: p.new_zeros(num_streams, *p.shape) for name, p in named}

    def _through_state(self, cotangent_BS: Tensor) -> Gradients:
        along_B = (cotangent_BS * self._tangent_BS).sum(1)
        return {name: torch.tensordot(along_B, c_B, 1) for name, c_B in self._cotangent_B.items()}

    def _advance(self, weights: Gradients, frame_BX: Tensor) -> None:
        signs_BS = torch.randint(2, self._state_BS.shape, generator=self._generator).to(self._state_BS) * 2 - 1

        def norm(tensors: Gradients) -> Tensor:
            return torch.stack([t.square().sum() for t in tensors.values()]).sum().sqrt()

        def one(
            x: Tensor, s_S: Tensor, tangent_S: Tensor, kept: Gradients, signs_S: Tensor
        ) -> tuple[Tensor, Gradients]:
            _, forward_S = jvp(lambda s: self._call(weights, x, s)[1], (s_S,), (tangent_S,))  # type: ignore[misc]
            (back,) = vjp(lambda w: self._call(w, x, s_S)[1], weights)[1](signs_S)
            e = self._epsilon
            scale_kept = (norm(kept) / (forward_S.norm() + e)).sqrt() + e
            scale_new = (norm(back) / (signs_S.norm() + e)).sqrt() + e
            tangent_S = scale_kept * forward_S + scale_new * signs_S
            return tangent_S, {name: kept[name] / scale_kept + back[name] / scale_new for name in kept}

        given = (frame_BX, self._state_BS, self._tangent_BS, self._cotangent_B, signs_BS)
        self._tangent_BS, self._cotangent_B = vmap(one)(*given)
