"""A model called for the comparison of a cut: on what, with what, and what it answered."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sidestream.circuit.measure import own_copies, own_copy
from sidestream.circuit.trace import one_line, place_of
from sidestream.errors import CutError

CHECKS = ("full", "once", "off")


@dataclass(frozen=True)
class Found:
    """What a look at the plain model found, for the guards of its graphs."""

    moving: frozenset[str] = frozenset()
    """Attributes that forward itself assigns."""
    keeps_weights: bool = False
    """Forward keeps what it computed from the weights in its first call."""
    fixed: tuple[tuple[str, Any, Any], ...] = ()
    """Plain values of globals and classes: path, table, key."""


NOTHING_FOUND = Found()


class Stream:
    """A streaming layer as something that is called frame after frame; ``state`` None: at its start."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.state = layer, None

    def __call__(self, frame_BCHW: Tensor) -> Any:
        if self.state is None:
            self.state = self.layer.init_state(frame_BCHW)
        answer, self.state = self.layer.step(frame_BCHW, self.state)
        return answer


def perturbed(example: Any, *, seed: int) -> Any:
    """Other values of the same shapes, types and strides: noise around floats, integers and flags in another order."""
    generator = torch.Generator().manual_seed(seed)

    def changed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided or leaf.numel() == 0:
            return own_copy(leaf) if isinstance(leaf, Tensor) else leaf
        fresh, plain = own_copy(leaf), leaf.detach().cpu()
        with torch.inference_mode(False), torch.no_grad():
            if leaf.is_floating_point() or leaf.is_complex():
                noise = torch.rand(leaf.shape, generator=generator).to(plain.dtype)
                scale = plain.abs().to(torch.float64).nan_to_num(0.0, 0.0, 0.0).mean().to(noise.real.dtype)
                other = torch.rand(leaf.shape, generator=generator).to(plain.dtype)
                values = plain * (0.75 + 0.5 * other) + (noise - 0.5) * (scale if scale > 0 else 1.0)
            else:
                order = torch.randperm(leaf.numel(), generator=generator)
                values = plain.reshape(-1)[order].reshape(leaf.shape)
            return fresh.copy_(values)

    return pytree.tree_map(changed, example)


def called(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    records: bool,
    watch: Any = None,
    call: Any = None,
) -> Any:
    """The model's answer to copies of the inputs; CutError where it fails."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    given_args, given_kwargs = pytree.tree_unflatten(own_copies(leaves), spec)
    try:
        with torch.set_grad_enabled(records and not torch.is_inference_mode_enabled()), watch or nullcontext():
            return (call or model)(*given_args, **given_kwargs)
    except CutError:
        raise
    except Exception as error:
        raise CutError(
            f"{type(model).__name__} fails on the example at {place_of(error)}: {type(error).__name__}: "
            f"{one_line(error)}; give an example that the model itself can answer"
        ) from error


def copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def check_of(how: str) -> str:
    """CutError for an unknown name."""
    if how not in CHECKS:
        raise CutError(f"check={how!r} is unknown; choose one of {', '.join(CHECKS)}")
    return how
