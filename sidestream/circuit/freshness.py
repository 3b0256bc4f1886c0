"""Whether a stage is still part of the model that was cut: weights that were replaced are taken over, the rest refused.

Weights that change in place are seen by every stage at once, since the tensors are shared. A tensor that is replaced
(``load_state_dict(assign=True)``, ``model.fc.weight = ...``) is another object: it is looked for at the start of each
run. A module that is replaced, a hook that is added, or another shape needs a new cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sidestream.circuit.step import GraphStep, Slot
from sidestream.errors import CircuitError


def guard_of(model: nn.Module, stage_module: nn.Module, step: GraphStep) -> Callable[[], None]:
    """What a stage does at the start of a run (``Stage.guard``)."""
    sources = {id(t): (m, table, key, path) for path, m in model.named_modules() for table, key, t in _tensors_of(m)}
    followed: list[_Followed] = []
    modules: dict[str, nn.Module] = {}
    for slot in step.slots:
        found = sources.get(id(slot[0].get(slot[1])))
        if found is not None:
            owner, table, key, path = found
            followed.append(_Followed(slot, table, key, f"{path}.{key}" if path else key))
            modules[path] = owner
    hooks = {path: _num_hooks(m) for path, m in model.named_modules() if path in modules or not path}
    return _Guard(model, followed, modules, hooks)


def _tensors_of(module: nn.Module) -> list[tuple[str, str, Any]]:
    registered = [(t, key, value) for t in ("_parameters", "_buffers") for key, value in getattr(module, t).items()]
    plain = [("__dict__", key, value) for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
    return [(t, key, value) for t, key, value in [*registered, *plain] if value is not None]


class _Followed:
    """A tensor of the model that a stage uses."""

    def __init__(self, slot: Slot, table: str, key: str, name: str) -> None:
        self.slot, self.table, self.key, self.name = slot, table, key, name
        self.last = slot[0][slot[1]]

    def follow(self, owner: nn.Module) -> None:
        """Take over what stands in the model now, if that was replaced since the last look."""
        now = (vars(owner) if self.table == "__dict__" else getattr(owner, self.table)).get(self.key)
        if now is self.last:
            return
        if not isinstance(now, torch.Tensor):
            raise CircuitError(f"{self.name!r} is no tensor of the model any more, as it was at the cut; cut it again")
        if (now.shape, now.dtype) != (self.last.shape, self.last.dtype):
            raise CircuitError(
                f"{self.name!r} was replaced after the cut: it was {tuple(self.last.shape)}, {self.last.dtype}, and is "
                f"{tuple(now.shape)}, {now.dtype}; cut the model again"
            )
        self.last = self.slot[0][self.slot[1]] = now


class _Guard:
    def __init__(
        self, model: nn.Module, followed: list[_Followed], modules: dict[str, nn.Module], hooks: dict[str, int]
    ) -> None:
        self._model, self._followed, self._modules, self._hooks = model, followed, modules, hooks

    def __call__(self) -> None:
        for path, module in self._modules.items():
            now = _at(self._model, path)
            if now is not module:
                raise CircuitError(f"module {path!r} of the model was replaced after the cut; cut the model again")
            if path in self._hooks and _num_hooks(module) != self._hooks[path]:
                raise CircuitError(
                    f"hooks of module {path!r} were added or removed after the cut, and stages do not call them; "
                    "cut the model again"
                )
        for followed in self._followed:
            followed.follow(self._modules[followed.name.rpartition(".")[0]])

    def __deepcopy__(self, memo: dict[int, Any]) -> _Guard:
        return self


def _at(model: nn.Module, path: str) -> Any:
    module: Any = model
    for name in path.split(".") if path else ():
        module = getattr(module, "_modules", {}).get(name)
        if module is None:
            return None
    return module


def _num_hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)
