"""Stands in a place whose old value nobody may use, to find out whether somebody does."""

from __future__ import annotations

from typing import Any


class Poison:
    """Stands in a place whose old value nobody may use: whatever is done with it raises ``PoisonRead``."""


class PoisonRead(Exception):
    """Something used an old value."""


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise PoisonRead


_OPERATORS = """
    add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv floordiv mod pow rpow matmul rmatmul and or xor
    neg pos abs invert lt le eq ne gt ge bool int float index len iter next contains getitem setitem delitem call
    getattr setattr hash str format enter torch_function
"""
for _name in _OPERATORS.split():
    setattr(Poison, f"__{_name}__", _refuse)
Poison.__torch_function__ = classmethod(_refuse)  # type: ignore[attr-defined]
