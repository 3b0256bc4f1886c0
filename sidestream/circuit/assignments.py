"""``self.h = ...`` on a registered buffer, while a model is traced: made a write to the buffer at the end of forward.

``torch.export`` sees assignments to buffers of the outermost module only, as they happen; those of modules inside are
lost. So its own eye on them is closed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sidestream.errors import CutError


@contextmanager
def assignments_written(model: nn.Module) -> Iterator[None]:
    """Inside, a call of ``model`` ends with every buffer that was assigned anew holding its new values in place."""
    forward = model.forward
    had_own = "forward" in vars(model)

    @functools.wraps(forward)
    def written(*args: Any, **kwargs: Any) -> Any:
        before = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
        with _unseen():
            answer = forward(*args, **kwargs)
        moved = [(m, name, old, m._buffers.get(name)) for m, name, old in before if m._buffers.get(name) is not old]
        if not moved:
            return answer
        old_buffers = [old for _, _, old, _ in moved]
        answer = pytree.tree_map(lambda leaf: _apart(leaf, old_buffers), answer)
        news = [_apart(new, old_buffers) for _, _, _, new in moved]
        for (module, name, old, _), new in zip(moved, news):
            _check(module, name, old, new)
            old.copy_(new)
            module._buffers[name] = old
        return answer

    model.forward = written  # type: ignore[method-assign]
    try:
        yield
    finally:
        if had_own:
            model.forward = forward  # type: ignore[method-assign]
        else:
            del model.forward


@contextmanager
def _unseen() -> Iterator[None]:
    """Without the hook by which the export notes assignments to the outermost module."""
    hooks = nn.modules.module._global_buffer_registration_hooks
    before = dict(hooks)
    for key, hook in before.items():
        if getattr(hook, "__module__", "").startswith("torch._functorch"):
            del hooks[key]
    try:
        yield
    finally:
        hooks.clear()
        hooks.update(before)


def _check(module: nn.Module, name: str, old: Tensor, new: Any) -> None:
    given = (tuple(new.shape), new.dtype) if isinstance(new, Tensor) else new
    if not isinstance(new, Tensor) or (new.shape, new.dtype) != (old.shape, old.dtype):
        raise CutError(
            f"buffer {name!r} of {type(module).__name__} is {tuple(old.shape)}, {old.dtype}, and its forward assigns "
            f"{given}; a state keeps its shape and type from frame to frame"
        )


def _apart(leaf: Any, buffers: list[Tensor]) -> Any:
    """A copy of what lies in the memory of one of the buffers, which is about to be written; anything else as it is."""
    if not isinstance(leaf, Tensor):
        return leaf
    shares = any(leaf.untyped_storage()._cdata == b.untyped_storage()._cdata for b in buffers)
    return leaf.clone() if shares else leaf
