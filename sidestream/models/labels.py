"""Names of classes: read from a file, or the well-known lists that torchvision carries."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from sidestream.errors import ModelError


def read_labels(path: str | os.PathLike[str]) -> list[str]:
    """Labels in the order of the model's outputs.

    The file is text with one label per line (blank lines at the end are left out), or JSON: a list of labels, or
    an object ``{"0": "label", ...}`` with every index from 0 (a label may also be a list, whose last item counts).
    Raises ``ModelError`` when the file cannot be read as either.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ModelError(f"cannot read the labels file {str(file)!r}: {reason}; expected text or JSON") from error
    labels = _from_json(text, file) if file.suffix.lower() == ".json" else [line.strip() for line in text.splitlines()]
    while labels and not labels[-1]:
        labels.pop()
    if not labels:
        raise ModelError(f"the labels file {str(file)!r} holds no label; expected one per line, or a JSON list")
    return labels


def _from_json(text: str, file: Path) -> list[str]:
    try:
        value = json.loads(text)
        items = [value[str(i)] for i in range(len(value))] if isinstance(value, dict) else value
        if not isinstance(items, list):
            raise TypeError(type(value).__name__)
        return [_label(item) for item in items]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ModelError(
            f"the labels file {str(file)!r} is not a JSON list of labels nor an object "
            f'{{"0": label, "1": label, ...}} with every index from 0 ({type(error).__name__}: {error})'
        ) from error


def _label(item: Any) -> str:
    if isinstance(item, list):
        item = item[-1]
    if not isinstance(item, str):
        raise TypeError(f"{item!r} is not a label")
    return item


@cache
def imagenet_labels() -> tuple[str, ...]:
    """The 1000 classes of ImageNet-1k, in the order that torchvision's and timm's models answer."""
    from torchvision.models import ResNet50_Weights

    return tuple(ResNet50_Weights.DEFAULT.meta["categories"])


@cache
def kinetics400_labels() -> tuple[str, ...]:
    """The 400 classes of Kinetics-400, in the order that torchvision's video models answer."""
    from torchvision.models.video import R3D_18_Weights

    return tuple(R3D_18_Weights.DEFAULT.meta["categories"])
