"""Parameters and buffers that were made in inference mode, which tracing cannot take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from sidestream.errors import CutError


@contextmanager
def usual_tensors(model: nn.Module) -> Iterator[int]:
    """Inside, the model holds copies of those parameters and buffers that were made in inference mode (which tracing
    cannot take); yields their number."""
    if lazy := [n for n, p in model.named_parameters() if isinstance(p, UninitializedParameter)]:
        raise CutError(f"{lazy[0]!r} is not initialised yet (a lazy module); call the model once before the cut")
    tables = [table for m in model.modules() for table in (m._parameters, m._buffers)]
    found = [(t, k, v) for t in tables for k, v in t.items() if v is not None and v.is_inference()]
    copies: dict[int, Any] = {}
    for table, key, value in found:
        if id(value) not in copies:
            copy = value.clone()
            copies[id(value)] = nn.Parameter(copy, value.requires_grad) if isinstance(value, nn.Parameter) else copy
        table[key] = copies[id(value)]  # type: ignore[assignment]
    try:
        yield len(found)
    finally:
        for table, key, value in found:
            table[key] = value  # type: ignore[assignment]
