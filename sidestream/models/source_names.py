"""Names of models as they are written in the source of torchvision and timm: to be had without importing them."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

_OTHER_TASKS = {"detection", "optical_flow", "quantization"}
"""Folders of torchvision with models that are not offered here."""


def may_have(package: str, name: str) -> bool:
    """Whether the source of ``package`` mentions ``name``: where it does not, no model is called so.

    Every model there is a function of its name, or an older name that stands for one; timm's tag is left out.
    """
    sources = _sources(package)
    base = name.partition(".")[0]
    return sources is None or (bool(base) and any(base in text for text in sources))


def source_names(package: str) -> list[str]:
    """The functions that make the package's models; none where it cannot be found."""
    found = []
    for text in _sources(package) or ():
        for part in text.split("@register_model")[1:]:
            if (function := re.search(r"^def (\w+)\(", part, re.MULTILINE)) is not None:
                found.append(function[1])
    return found


@cache
def _sources(package: str) -> tuple[str, ...] | None:
    """The texts of its folder of models; None where it cannot be found."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "models"
    files = [file for file in sorted(folder.rglob("*.py")) if file.parent.name not in _OTHER_TASKS]
    return tuple(file.read_text(encoding="utf-8") for file in files) or None
