"""Autocast around a run that was not around the cut: asked once whether the stages still are the model.

A graph keeps what Python code asked of types while it was traced (``torch.zeros(..., dtype=x.dtype)``, the hidden state
of an LSTM), and under autocast types are others. So before the first run in such a mode the model and the stages are
compared in it, on the frames of the cut's own comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from sidestream.circuit.memory import kept
from sidestream.circuit.same import same
from sidestream.errors import CircuitError, SidestreamError

_DEVICES = ("cpu", "cuda")
Mode = tuple[torch.dtype | None, ...]


def autocast_mode() -> Mode:
    """The type that autocast gives on each kind of device in the calling thread; None where it is off."""
    return tuple(torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in _DEVICES)


class AutocastCheck:
    """A guard: calls ``before``; CircuitError where the stages are not the model under the autocast of the caller.

    ``run`` gives the stages' answers to several frames in a row; ``begin`` what answers one frame after the other as
    the model does, where that is not the model itself.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Callable[[Sequence[Any]], Iterator[Any]],
        probes: Sequence[Any],
        before: Callable[[], None] | None,
        begin: Callable[[], Callable[..., Any]] | None = None,
    ) -> None:
        self._model, self._run, self._probes, self._before = model, run, tuple(probes), before
        self._begin = begin or (lambda: model)
        self._fine = {autocast_mode()}

    def __call__(self) -> None:
        if self._before is not None:
            self._before()
        mode = autocast_mode()
        if mode in self._fine or not self._probes:
            return
        if not self._agree():
            on = next((str(dtype).removeprefix("torch.") for dtype in mode if dtype is not None), None)
            asked = "without autocast" if on is None else f"under autocast to {on}"
            raise CircuitError(
                f"{asked} the stages do not give what {type(self._model).__name__} gives: it was cut in another mode, "
                f"and asks for types in its code; cut it {asked} too"
            )
        self._fine.add(mode)

    def _agree(self) -> bool:
        with kept(self._model) as state:
            try:
                with torch.inference_mode(not self._model.training):
                    call = self._begin()
                    wanted = [_copied(call(*args, **kwargs)) for args, kwargs in self._probes]
                state.restore()
                return all(map(same, wanted, map(_copied, self._run(self._probes))))
            except SidestreamError:
                raise
            except Exception:  # the graph cannot work in this mode
                return False

    def __deepcopy__(self, memo: dict[int, Any]) -> AutocastCheck:
        return self


def _copied(answer: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, answer)
