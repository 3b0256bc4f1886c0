"""Which names the model's own code uses, and which of the things behind them may be places for its state."""

from __future__ import annotations

import dis
import functools
import sys
import types
from typing import Any

LIBRARIES = frozenset({"torch", "numpy", "torchvision", "timm", "transformers", "einops", "sidestream", "builtins"})


def is_of_torch(thing: Any) -> bool:
    module = getattr(thing, "__module__", None) or ""
    return module == "torch" or module.startswith(("torch.", "einops.", "numpy.", "builtins"))


_CONTAINERS = frozenset(
    {"SimpleNamespace", "Namespace", "UserDict", "UserList", "UserString", "ChainMap", "Queue", "LifoQueue"}
    | {"PriorityQueue", "local", "_local", "WeakKeyDictionary", "WeakValueDictionary", "WeakSet"}
)


def holds_state(kind: type) -> bool:
    """Whether objects of this class are looked into: not those of the standard library (files, locks, loggers ...) but
    for its containers."""
    return kind.__module__.partition(".")[0] not in sys.stdlib_module_names or is_of_containers(kind)


def is_of_containers(kind: type) -> bool:
    """Whether it is a container of the standard library that is made of Python objects."""
    return kind.__module__.partition(".")[0] in sys.stdlib_module_names and kind.__name__ in _CONTAINERS


def slots_of(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(s for s in slots if s not in ("__dict__", "__weakref__"))
    private = f"_{cls.__name__.lstrip('_')}"
    return tuple(f"{private}{n}" if n.startswith("__") and not n.endswith("__") else n for n in names)


def key_text(key: Any) -> str:
    return (
        repr(key)[:80]
        if isinstance(key, str | int | float | bool | tuple | None)
        else f"{type(key).__name__} {id(key)}"
    )


def is_near(module: str | None, table: dict[str, Any]) -> bool:
    """Whether a class is of the same package as the code that uses it, and so perhaps a place for its state."""
    own = str(table.get("__name__", "?")).partition(".")[0]
    return (module or "").partition(".")[0] == own and not is_library(own)


@functools.lru_cache(maxsize=4096)
def is_library(root: str) -> bool:
    """Whether a package is part of Python or was installed, rather than the user's own code."""
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return root in LIBRARIES or root in sys.stdlib_module_names or "site-packages" in file or "dist-packages" in file


class SameThing:
    """Stands for one thing: the same only as itself."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameThing) and other.thing is self.thing

    __hash__ = None  # type: ignore[assignment]


@functools.lru_cache(maxsize=4096)
def globals_in(code: types.CodeType) -> tuple[str, ...]:
    """Names that a function or one inside of it looks up, or sets, outside of itself."""
    own = [i.argval for i in dis.get_instructions(code) if i.opname.endswith(("_GLOBAL", "_NAME"))]
    inner = (name for const in code.co_consts if isinstance(const, types.CodeType) for name in globals_in(const))
    return tuple(dict.fromkeys([*own, *inner]))


@functools.lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> tuple[str, ...]:
    """All names, of attributes too, in a function or one inside of it."""
    inner = (name for const in code.co_consts if isinstance(const, types.CodeType) for name in names_in(const))
    return tuple(dict.fromkeys([*code.co_names, *inner]))
