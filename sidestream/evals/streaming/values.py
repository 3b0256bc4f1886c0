"""What an answer or a ground truth can be: a class, ranked classes, boxes, points, masks; and each as a JSON record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidestream.errors import InputError


@dataclass(frozen=True, slots=True)
class ClassLabel:
    """The true class of a frame."""

    label: int


@dataclass(frozen=True, slots=True)
class Classes:
    """The k best classes of an answer with their logits, best first."""

    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """Objects in a frame. In a ground truth the scores are 1."""

    boxes_N4_px: Tensor
    """x_min, y_min, x_max, y_max in pixels of the frame, float32."""
    scores_N: Tensor
    labels_N: Tensor
    """int64."""


@dataclass(frozen=True, slots=True, eq=False)
class Points:
    """Keypoints of one person or object."""

    points_P2_px: Tensor
    """x, y in pixels of the frame, float32."""
    scores_P: Tensor
    """In a ground truth: 1 where the point is labelled, 0 where it is not and does not count."""


@dataclass(frozen=True, slots=True)
class Masks:
    """A mask in a safetensors file: bool (H, W)."""

    file: str
    """Relative to the folder of the log."""
    key: str

    def load(self, folder: str | Path) -> Tensor:
        """The mask. Raises ``InputError`` where the file or the key is not there, or it is no bool mask."""
        from safetensors import SafetensorError, safe_open

        path = Path(folder) / self.file
        try:
            with safe_open(str(path), "pt") as file:
                mask_HW = file.get_tensor(self.key)
        except (OSError, SafetensorError) as error:
            raise InputError(f"no mask {self.key!r} in {path}: {error}; keep the file beside the log") from error
        if mask_HW.dtype != torch.bool or mask_HW.ndim != 2:
            raise InputError(
                f"the mask {self.key!r} in {path} is {mask_HW.dtype} of shape {tuple(mask_HW.shape)}; "
                "expected bool with axes (H, W)"
            )
        return mask_HW


Value = ClassLabel | Classes | Boxes | Points | Masks


def to_record(value: Value) -> dict[str, Any]:
    """Plain values for JSON; every float32 comes back the same."""
    match value:
        case ClassLabel():
            return {"kind": "class", "label": value.label}
        case Classes():
            return {"kind": "classes", "top": [list(each) for each in value.top]}
        case Boxes():
            return {
                "kind": "boxes",
                "boxes_px": value.boxes_N4_px.tolist(),
                "scores": value.scores_N.tolist(),
                "labels": value.labels_N.tolist(),
            }
        case Points():
            return {"kind": "points", "points_px": value.points_P2_px.tolist(), "scores": value.scores_P.tolist()}
        case Masks():
            return {"kind": "masks", "file": value.file, "key": value.key}
    raise InputError(f"a {type(value).__name__} is no answer; expected one of {', '.join(_KEYS)}")


def from_record(record: Any) -> Value:
    """The value of a record. Raises ``InputError`` for anything that ``to_record`` does not write."""
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind not in _KEYS:
        raise InputError(f"a value of kind {kind!r}; expected one of {', '.join(_KEYS)}")
    if set(record) != {"kind", *_KEYS[kind]}:
        raise InputError(f"a value of kind {kind!r} has the keys {sorted(record)}; expected kind, {_KEYS[kind]}")
    if kind == "class":
        return ClassLabel(_whole(record["label"]))
    if kind == "classes":
        return Classes(tuple((_whole(label), _real(logit)) for label, logit in _rows(record["top"], 2)))
    if kind == "boxes":
        boxes = _tensor(record["boxes_px"], 4)
        labels_N = torch.tensor([_whole(label) for label in _list(record["labels"])], dtype=torch.int64)
        return Boxes(boxes, _scores(record["scores"], len(boxes)), _same_length(labels_N, len(boxes)))
    if kind == "points":
        points = _tensor(record["points_px"], 2)
        return Points(points, _scores(record["scores"], len(points)))
    return Masks(_text(record["file"]), _text(record["key"]))


_KEYS: dict[str, tuple[str, ...]] = {
    "class": ("label",),
    "classes": ("top",),
    "boxes": ("boxes_px", "scores", "labels"),
    "points": ("points_px", "scores"),
    "masks": ("file", "key"),
}


def _tensor(rows: Any, width: int) -> Tensor:
    return torch.tensor([[_real(x) for x in row] for row in _rows(rows, width)], dtype=torch.float32).reshape(-1, width)


def _scores(values: Any, length: int) -> Tensor:
    return _same_length(torch.tensor([_real(x) for x in _list(values)], dtype=torch.float32), length)


def _same_length(values: Tensor, length: int) -> Tensor:
    if len(values) != length:
        raise InputError(f"{len(values)} scores or labels for {length} boxes or points; give one for each")
    return values


def _rows(values: Any, width: int) -> list[list[Any]]:
    if any(not isinstance(row, list) or len(row) != width for row in _list(values)):
        raise InputError(f"{str(values)[:80]} are not rows of {width} numbers")
    return values


def _list(values: Any) -> list[Any]:
    if not isinstance(values, list):
        raise InputError(f"{str(values)[:80]!r} is a {type(values).__name__}; expected a list")
    return values


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"{value!r} is no whole number from 0 on")
    return value


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{value!r} is no number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{value!r} is no name")
    return value
