"""Weights that a runtime holds copies of: seen when they are replaced or changed after the conversion.

A converted stage answers with the weights that it was converted with. To be stale without a word would be wrong, so
the stage's guard compares, at the start of every run, what its module holds now with what it held then: the tensors
themselves, their version counters, their memory, and a few of their values (a write through ``.data`` is not counted).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.errors import CircuitError

NUM_SAMPLES = 8
"""Values per tensor that are compared: spread over it, so that an update of all of it is seen."""


@dataclass(frozen=True, eq=False)
class Held:
    """One tensor where a module keeps it."""

    owner: dict[str, Any]
    key: str
    name: str
    tensor: Tensor
    version: int | None
    address: int

    def is_as_it_was(self) -> bool:
        now = self.owner.get(self.key)
        return now is self.tensor and _version(now) == self.version and _address(now) == self.address


@dataclass(frozen=True, eq=False)
class Weights:
    """The parameters, buffers and plain tensors of a module, as they were when this was made."""

    held: tuple[Held, ...]
    samples: tuple[Tensor, ...]
    """Views into the tensors."""
    values: Tensor | None
    """What the views held."""

    def changed(self) -> str | None:
        """The name of a tensor that was replaced or written to since, or None."""
        for held in self.held:
            if not held.is_as_it_was():
                return held.name
        if self.values is not None and not torch.equal(_values(self.samples), self.values):
            return next(h.name for h, was, now in self._sampled() if not torch.equal(was, now))
        return None

    def _sampled(self) -> Iterator[tuple[Held, Tensor, Tensor]]:
        assert self.values is not None
        sampled = [held for held in self.held if _can_sample(held.tensor)]
        parts = self.values.split([len(view) for view in self.samples])
        for held, was, view in zip(sampled, parts, self.samples, strict=True):
            yield held, was, _values((view,))


def weights_of(module: nn.Module) -> Weights:
    """What ``module`` holds now."""
    held = tuple(_held(module))
    samples = tuple(_sample(h.tensor) for h in held if _can_sample(h.tensor))
    return Weights(held, samples, _values(samples) if samples else None)


def guard(weights: Weights, stage: str, backend: str, before: Callable[[], None] | None) -> Callable[[], None]:
    """Calls ``before``, and then raises CircuitError when the weights are not what they were."""

    def unchanged() -> None:
        if before is not None:
            before()
        name = weights.changed()
        if name is not None:
            raise CircuitError(
                f"the weights of stage {stage!r} were changed after it was converted for {backend!r} ({name!r} is not "
                "what it was), and the runtime holds copies; convert again (compile_stages)"
            )

    return unchanged


def _held(module: nn.Module) -> Iterator[Held]:
    for path, part in module.named_modules():
        for owner in (part._parameters, part._buffers, vars(part)):
            for key, value in owner.items():
                if isinstance(value, Tensor):
                    name = f"{path}.{key}" if path else key
                    yield Held(owner, key, name, value, _version(value), _address(value))


def _version(value: Any) -> int | None:
    return None if not isinstance(value, Tensor) or value.is_inference() else value._version


def _address(value: Tensor) -> int:
    return value.data_ptr() if _can_sample(value) else 0


def _can_sample(value: Tensor) -> bool:
    plain = value.layout == torch.strided and value.device.type == "cpu"
    return plain and not value.is_quantized and not value.is_complex()


def _sample(value: Tensor) -> Tensor:
    """A view of a few of the values, spread over the memory; of the first only, where the memory has holes."""
    value = value.detach()
    if value.numel() == 0:
        return value.reshape(0)
    span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    count = min(NUM_SAMPLES, span) if span == value.numel() else 1
    return value.as_strided((count,), (max(span // NUM_SAMPLES, 1),), value.storage_offset())


def _values(samples: tuple[Tensor, ...]) -> Tensor:
    """The sampled values as numbers of one type, NaN as a number."""
    with torch.no_grad():
        return torch.cat([sample.double() for sample in samples]).nan_to_num()
