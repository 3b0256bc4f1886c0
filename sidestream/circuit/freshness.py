"""Whether a stage is still part of the model that was cut: weights that were replaced are taken over, the rest refused.

Weights that change in place are seen by every stage at once, since the tensors are shared. A tensor that is replaced
(``load_state_dict(assign=True)``, ``model.fc.weight = ...``) is another object: it is looked for at the start of each
run. A module that is replaced, a hook that is added, another shape, or another number or flag in an attribute needs a
new cut.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from sidestream.circuit.same import same_leaf
from sidestream.circuit.step import GraphStep, Slot
from sidestream.errors import CircuitError

_PLAIN = (int, float, bool, str, type(None), tuple)


def guard_of(
    model: nn.Module, step: GraphStep, paths: Collection[str], moving: Collection[str] = ()
) -> Callable[[], None]:
    """What a stage does at the start of a run (``Stage.guard``). ``paths``: dotted names of the modules that work in
    it. ``moving``: attributes that forward itself assigns."""
    sources = {id(t): (m, table, key, path) for path, m in model.named_modules() for table, key, t in _tensors_of(m)}
    followed: list[_Followed] = []
    modules = {path: m for path, m in model.named_modules(remove_duplicate=False) if path in paths}
    for slot in step.slots:
        found = sources.get(id(slot[0].get(slot[1])))
        if found is not None:
            owner, table, key, path = found
            followed.append(_Followed(slot, table, key, f"{path}.{key}" if path else key))
            modules[path] = owner
    hooks = {path: _num_hooks(m) for path, m in model.named_modules() if path in modules or not path}
    plain = [p for path, m in modules.items() for p in _plain_of(path, m) if p.name not in moving]
    return _Guard(model, followed, modules, hooks, plain)


def _plain_of(path: str, module: nn.Module) -> list[_Attribute]:
    """Numbers, flags and plain tensors in attributes of a module, which are part of the graph."""
    names = {key for key in vars(module) if key != "training" and not key.startswith("_")}
    values = {key: vars(module)[key] for key in names}
    kept = {k: v for k, v in values.items() if isinstance(v, (*_PLAIN, torch.Tensor))}
    return [_Attribute(module, key, value, f"{path}.{key}" if path else key) for key, value in kept.items()]


class _Attribute:
    """An attribute of the model that the graph has taken over."""

    def __init__(self, module: nn.Module, key: str, value: Any, name: str) -> None:
        self.module, self.key, self.value, self.name = module, key, value, name
        self.version = _version(value)

    def check(self) -> None:
        """CircuitError where it is another one now."""
        now = vars(self.module).get(self.key)
        is_same = now is self.value if isinstance(self.value, torch.Tensor) else same_leaf(now, self.value)
        if not is_same or _version(now) != self.version:
            raise CircuitError(
                f"{self.name!r} of the model was changed after the cut, which took over its value; cut the model again"
            )


def _version(value: Any) -> int:
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else 0


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
        self,
        model: nn.Module,
        followed: list[_Followed],
        modules: dict[str, nn.Module],
        hooks: dict[str, int],
        plain: list[_Attribute],
    ) -> None:
        self._model, self._followed, self._modules, self._hooks = model, followed, modules, hooks
        self._plain = plain

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
        for attribute in self._plain:
            attribute.check()
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
