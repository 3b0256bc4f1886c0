"""Modes of the caller that an executor's threads take over: autocast belongs to a thread, and a pool has its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Modes:
    """Autocast as it is where ``run`` is called: for each kind of device whether it is on, and its type."""

    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @contextmanager
    def here(self) -> Iterator[None]:
        """Inside, the calling thread works in these modes."""
        with ExitStack() as stack:
            for device, is_on, dtype in self.autocast:
                if is_on != torch.is_autocast_enabled(device) or (is_on and dtype != torch.get_autocast_dtype(device)):
                    # without its cache of cast weights: it would outlive a change of the weights
                    stack.enter_context(torch.autocast(device, dtype=dtype, enabled=is_on, cache_enabled=False))
            yield


def caller_modes() -> Modes:
    """The modes of the calling thread."""
    devices = [d for d in _DEVICES if d == "cpu" or torch.cuda.is_available()]
    return Modes(tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices))
