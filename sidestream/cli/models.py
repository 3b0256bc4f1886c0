"""``sidestream models``: which models there are."""

from __future__ import annotations

from typing import Annotated

import tyro


def models(pattern: Annotated[str, tyro.conf.Positional] = "*") -> int:
    """List the models that can be run by name.

    Args:
        pattern: shell pattern, such as "*resnet*" or "timm/vit*".
    """
    from sidestream.errors import ModelError
    from sidestream.models import list_models

    names = list_models(pattern)
    if not names:
        raise ModelError(f"no model matches {pattern!r}; sidestream models lists all")
    print("\n".join(names))
    return 0
