"""What a class answer looks like: the top k of a row of logits, as records and as lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sidestream.errors import ModelError
from sidestream.types import Output


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


def answer_record(output: Output, top: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of ``--json``."""
    return {
        "frame": output.frame_index,
        "pts_seconds": output.pts_seconds,
        "made_at_seconds": output.made_at_seconds,
        "age_ticks": output.age_ticks,
        "top": top,
    }


def answer_lines(top: list[dict[str, Any]]) -> list[str]:
    """The answer as lines for a picture, best first."""
    return [f"{t['probability']:.2f}  {t['label']}" for t in top]
