"""What an answer looks like: the top k of a row of logits, or keypoints; as records, as text, as a drawing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sidestream.errors import ModelError
from sidestream.types import InputSpec, Output


@dataclass(frozen=True, slots=True)
class Reading:
    """What an answer says."""

    fields: dict[str, Any]
    """Its part of a line of ``--json``."""
    drawing: dict[str, Any]
    """How ``video.overlay`` draws it: keyword arguments."""


def class_reader(labels: Sequence[str] | None, *, top_k: int) -> Callable[[Output], Reading]:
    """Reads logits: the k best classes."""

    def read(output: Output) -> Reading:
        top = top_classes(output.value, labels, top_k=top_k)
        return Reading({"top": top}, {"labels": answer_lines(top)})

    return read


def points_reader(spec: InputSpec) -> Callable[[Output], Reading]:
    """Reads heat maps: the keypoints, in pixels of the frame; 15 of them are drawn as JHMDB's person."""
    from sidestream.evals.streaming.judge import points_answer

    points_of = points_answer(spec)

    def read(output: Output) -> Reading:
        points: Any = points_of(output)
        fields = {"points_px": points.points_P2_px.tolist(), "scores": points.scores_P.tolist()}
        return Reading(fields, draw_points(points))

    return read


def draw_points(points: Any) -> dict[str, Any]:
    """Keyword arguments of ``video.overlay`` for ``evals.streaming.Points``."""
    from sidestream.video.overlay import JHMDB_SKELETON

    is_person = len(points.points_P2_px) == len(JHMDB_SKELETON) + 1
    drawing = {"points_NP2_px": points.points_P2_px, "scores_NP": points.scores_P}
    return drawing | {"skeleton": JHMDB_SKELETON} if is_person else drawing


def top_classes(value: Any, labels: Sequence[str] | None, *, top_k: int) -> list[dict[str, Any]]:
    """The k largest of logits (1, N), best first: index, label, logit and softmax probability."""
    if not (isinstance(value, Tensor) and value.ndim == 2 and value.shape[0] == 1):
        given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ModelError(
            f"the model answers with {given}; this command wants class logits of shape (1, classes). "
            "Use the Python API (sidestream.run) for other answers"
        )
    logits_N = value[0].float()
    probabilities_N = torch.softmax(logits_N, dim=0)
    best = torch.topk(logits_N, min(top_k, logits_N.numel()))
    return [
        {
            "index": index,
            "label": labels[index] if labels is not None else f"class {index}",
            "logit": logit,
            "probability": float(probabilities_N[index]),
        }
        for logit, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def answer_record(output: Output, fields: dict[str, Any]) -> dict[str, Any]:
    """One line of ``--json``."""
    return {
        "frame": output.frame_index,
        "pts_seconds": output.pts_seconds,
        "made_at_seconds": output.made_at_seconds,
        "age_ticks": output.age_ticks,
        **fields,
    }


def answer_lines(top: list[dict[str, Any]]) -> list[str]:
    """The answer as lines for a picture, best first."""
    return [f"{t['probability']:.2f}  {t['label']}" for t in top]
