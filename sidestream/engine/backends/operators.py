"""Operators that a back end is known to run otherwise than eager, where no example shows it: refused by name.

Inputs of whole numbers may be indices, so the check never leaves the range of the example (``probes.py``). What goes
wrong outside of that range only is found here, from the operators that eager runs on the example.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ONNX = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Known:
    """One operator, where it differs and when."""

    backends: tuple[str, ...]
    reason: str
    applies: Callable[[tuple[Any, ...]], bool] = lambda args: True
    """Whether a call with these arguments may differ."""


def _by_a_tensor(args: tuple[Any, ...]) -> bool:
    return len(args) > 1 and isinstance(args[1], Tensor)


def _of_signed(args: tuple[Any, ...]) -> bool:
    return isinstance(args[0], Tensor) and args[0].dtype.is_signed


_BY_A_TENSOR = Known(ONNX, "a shift by a tensor, which differs where the shift is negative", _by_a_tensor)
_OF_SIGNED = Known(("openvino",), "a shift to the right of signed numbers, which differs below zero", _of_signed)
KNOWN: dict[str, tuple[Known, ...]] = {
    "aten::__lshift__": (_BY_A_TENSOR,),
    "aten::__rshift__": (_BY_A_TENSOR, _OF_SIGNED),
    "aten::bitwise_left_shift": (_BY_A_TENSOR,),
    "aten::bitwise_right_shift": (_BY_A_TENSOR, _OF_SIGNED),
}
"""By the operator's name; its variants that write in place have the same name with an underscore more."""


MOVES = re.compile(
    "aten::(alias|as_strided|cat|clone|copy_|detach|expand|flatten|index_select|lift_fresh|permute|reshape|select|slice|"
    "split|squeeze|stack|t|transpose|unbind|unflatten|unsqueeze|view|_unsafe_view|zeros|zeros_like|"
    "(new_)?(empty|full|ones|zeros)(_like|_strided)?)"
)
"""Operators that make no number: they copy, join and look at memory."""


def only_moves(run: Callable[[], Any]) -> bool:
    """Whether ``run`` does nothing but move memory: a runtime would have nothing to compute."""
    with _Names() as mode:
        run()
    return all(map(MOVES.fullmatch, mode.names))


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Under it, what eager runs is looked up: ``found`` are the reasons against ``backend``."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self._backend = backend
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for known in KNOWN.get(func._schema.name, KNOWN.get(func._schema.name.removesuffix("_"), ())):
            if self._backend in known.backends and known.applies(args):
                self.found.append(f"{known.reason} ({func._schema.name})")
        return func(*args, **(kwargs or {}))
