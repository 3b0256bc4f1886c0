"""What a model does besides answering, seen while it runs: it writes to parameters, it turns gradients on or off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sidestream.circuit.measure import storage_of
from sidestream.circuit.same import same_leaf
from sidestream.circuit.undo import same_memory
from sidestream.errors import CutError


class GradientSwitches(TorchFunctionMode):
    """Sees whether the model turns gradients on or off."""

    was_used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            self.was_used = True
        return func(*args, **(kwargs or {}))


class _ParameterWrites(TorchDispatchMode):
    """Copies each parameter before an operator writes to it, so that it can be put back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.memory = {storage_of(p): (name, p) for name, p in model.named_parameters() if not p.is_meta}
        self.kept: dict[Any, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and (key := storage_of(leaf)) in self.memory and key not in self.kept:
                    self._keep_if_written(func, args, kwargs or {}, key)
        return func(*args, **(kwargs or {}))

    def _keep_if_written(self, func: Any, args: Any, kwargs: Any, key: Any) -> None:
        values = [*args, *[kwargs.get(a.name) for a in func._schema.arguments[len(args) :]]]
        for argument, value in zip(func._schema.arguments, values):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)] if is_written else []
            if any(storage_of(t) == key for t in tensors):
                self.kept[key] = self.memory[key][1].detach().clone()


@contextmanager
def watching_parameters(model: nn.Module) -> Iterator[None]:
    """CutError for a model whose forward writes to its parameters, which are put back."""
    watch = _ParameterWrites(model)
    memory = [(name, p, p.data) for name, p in model.named_parameters()]
    written = ""
    with watch:
        yield
    with torch.no_grad():
        for name, parameter, data in memory:  # other memory, by .data = ...
            if not same_memory(parameter, data):
                parameter.data = data
                written = written or name
        for key, value in watch.kept.items():
            name, parameter = watch.memory[key]
            if not same_leaf(parameter.detach(), value):
                parameter.detach().copy_(value)
                written = written or name
    if written:
        raise CutError(
            f"the forward of {type(model).__name__} writes to its parameter {written!r}, which stages share with the "
            "model and with each other; make it a buffer (self.register_buffer)"
        )
