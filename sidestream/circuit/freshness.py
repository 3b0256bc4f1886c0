"""Whether a stage is still part of the model that was cut: weights that were replaced are taken over, the rest refused.

Weights that change in place are seen by every stage at once, since the tensors are shared. A tensor that is replaced
(``load_state_dict(assign=True)``, ``model.fc.weight = ...``) is another object: it is looked for at the start of each
run. A module that is replaced, a hook that is added, another shape, or another number or flag in an attribute needs a
new cut.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sidestream.circuit.attributes import Attribute, Weight, attributes_of
from sidestream.circuit.step import GraphStep, Slot
from sidestream.errors import CircuitError


def guard_of(
    model: nn.Module,
    step: GraphStep,
    paths: Collection[str],
    moving: Collection[str] = (),
    whole: Collection[nn.Module] = (),
    fixed: Collection[tuple[str, Any, Any]] = (),
    *,
    keeps_weights: bool = False,
) -> Callable[[], None]:
    """What a stage does at the start of a run (``Stage.guard``). ``paths``: dotted names of the modules that work in
    it. ``moving``: attributes that forward assigns itself. ``whole``: modules kept whole, whose mode counts. ``fixed``:
    plain values of globals and classes. ``keeps_weights``: forward keeps what it once computed from the weights."""
    sources: dict[int, list[_Place]] = {}
    for path, m in model.named_modules():
        for table, key, t in _tensors_of(m):
            sources.setdefault(id(t), []).append(_Place(path, m, table, key))
    followed: list[_Followed] = []
    modules = {path: m for path, m in model.named_modules(remove_duplicate=False) if path in paths}
    for slot in step.slots:
        found = sources.get(id(slot[0].get(slot[1])))
        if found is not None:
            followed.append(_Followed(slot, found))
            modules.update((place.path, place.module) for place in found)
    hooks = {path: _hooks(m) for path, m in model.named_modules() if path in modules or not path}
    hooks = {path: own for path, own in hooks.items() if f"hooks of {path or 'the model'}" not in moving}
    plain = [a for path, m in modules.items() for a in attributes_of(path, m) if not a.is_in(moving)]
    plain += [a for a in (Attribute(table, key, path) for path, table, key in fixed) if not a.is_in(moving)]
    if keeps_weights:
        plain += [
            Weight(m._parameters, key, f"{path}.{key}".lstrip("."))
            for path, m in model.named_modules()
            for key in m._parameters
        ]
    modes = [(m, m.training) for outer in whole for m in outer.modules()]
    return _Guard(model, followed, modules, hooks, plain, modes)


def _tensors_of(module: nn.Module) -> list[tuple[str, str, Any]]:
    registered = [(t, key, value) for t in ("_parameters", "_buffers") for key, value in getattr(module, t).items()]
    plain = [("__dict__", key, value) for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
    return [(t, key, value) for t, key, value in [*registered, *plain] if value is not None]


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the model stands; tied ones stand in several."""

    path: str
    module: nn.Module
    table: str
    key: str

    @property
    def name(self) -> str:
        return f"{self.path}.{self.key}" if self.path else self.key

    def now(self) -> Any:
        return (vars(self.module) if self.table == "__dict__" else getattr(self.module, self.table)).get(self.key)


class _Followed:
    """A tensor of the model that a stage uses."""

    def __init__(self, slot: Slot, places: list[_Place]) -> None:
        self.slot, self.places = slot, places
        self.last = slot[0][slot[1]]
        self.shape, self.dtype = self.last.shape, self.last.dtype

    def follow(self) -> None:
        """Take over what stands in the model now, if that was replaced since the last look."""
        name, now = self.places[0].name, self.places[0].now()
        if any(place.now() is not now for place in self.places):
            tied = " and ".join(repr(place.name) for place in self.places)
            raise CircuitError(f"{tied} were one tensor at the cut and are several now; cut the model again")
        if not isinstance(now, torch.Tensor):
            raise CircuitError(f"{name!r} is no tensor of the model any more, as it was at the cut; cut it again")
        if (now.shape, now.dtype) != (self.shape, self.dtype):
            raise CircuitError(
                f"{name!r} was replaced after the cut: it was {tuple(self.shape)}, {self.dtype}, and is "
                f"{tuple(now.shape)}, {now.dtype}; cut the model again"
            )
        if now is not self.last:
            self.last = self.slot[0][self.slot[1]] = now


class _Guard:
    def __init__(
        self,
        model: nn.Module,
        followed: list[_Followed],
        modules: dict[str, nn.Module],
        hooks: dict[str, list[Any]],
        plain: list[Attribute],
        modes: list[tuple[nn.Module, bool]],
    ) -> None:
        self._model, self._followed, self._modules, self._hooks = model, followed, modules, hooks
        self._plain, self._modes = plain, modes
        self._forms = {path: _form(module) for path, module in modules.items()}

    def __call__(self) -> None:
        for path, module in self._modules.items():
            now = _at(self._model, path)
            if now is not module:
                raise CircuitError(f"module {path!r} of the model was replaced after the cut; cut the model again")
            if _form(module) != self._forms[path]:
                raise CircuitError(
                    f"module {path!r} of the model has another class, forward or children than at the cut; cut it again"
                )
            if path in self._hooks and [*map(id, _hooks(module))] != [*map(id, self._hooks[path])]:
                raise CircuitError(
                    f"hooks of module {path!r} were added, removed or exchanged after the cut, and stages do not call "
                    "them; cut the model again"
                )
        for module, mode in self._modes:
            if module.training != mode:
                raise CircuitError(
                    f"a {type(module).__name__} that is kept whole was cut in {'train' if mode else 'eval'} mode and "
                    "is in the other one now; put it back, or cut the model again"
                )
        for attribute in self._plain:
            attribute.check()
        for followed in self._followed:
            followed.follow()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Guard:
        return self


def _at(model: nn.Module, path: str) -> Any:
    module: Any = model
    for name in path.split(".") if path else ():
        module = getattr(module, "_modules", {}).get(name)
        if module is None:
            return None
    return module


def _form(module: nn.Module) -> tuple[Any, ...]:
    return type(module), vars(module).get("forward"), tuple(module._modules)


def _hooks(module: nn.Module) -> list[Any]:
    shared = nn.modules.module
    own = (module._forward_hooks, module._forward_pre_hooks)
    return [
        hook
        for table in (*own, shared._global_forward_hooks, shared._global_forward_pre_hooks)
        for hook in table.values()
    ]
