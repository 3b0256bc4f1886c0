"""``sidestream models``: which models there are, and what they want to be fed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from sidestream.types import InputSpec

MAX_DETAILED = 200
"""Models whose details are shown at once: each is laid out, which takes a moment."""


def models(pattern: Annotated[str, tyro.conf.Positional] = "*", details: bool = False) -> int:
    """List the models that can be run by name.

    Args:
        pattern: shell pattern, such as "*resnet*" or "timm/vit*".
        details: also parameters, frames, size, look-ahead of the streaming form, and default weights.
    """
    from sidestream.errors import InputError, ModelError
    from sidestream.models import list_models

    names = list_models(pattern)
    if not names:
        raise ModelError(f"no model matches {pattern!r}; sidestream models lists all")
    if not details:
        print("\n".join(names))
        return 0
    if len(names) > MAX_DETAILED:
        raise InputError(f"{pattern!r} matches {len(names)} models; --details shows up to {MAX_DETAILED}: narrow it")
    _show([detail(name) for name in names])
    return 0


def detail(name: str) -> dict[str, Any]:
    """One row about a model; it is laid out without memory for its weights."""
    import torch

    from sidestream.models import create_model, model_info

    try:
        with torch.device("meta"):
            model = create_model(name)
    except (NotImplementedError, RuntimeError):  # some read numbers while they are made
        model = create_model(name)
    info = model_info(name)
    spec = info.input_spec
    is_clip = spec.layout == "BTCHW"
    return {
        "model": name,
        "parameters (millions)": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}",
        "frames": _frames(spec) if is_clip else "1",
        "every": spec.frame_step if is_clip else "",
        "size (px)": f"{spec.size_px[0]} x {spec.size_px[1]}",
        "causal": "yes" if spec.causal else "no",
        "stream": _stream(model, spec.delay_ticks) if is_clip else "frame by frame",
        "default weights": "yes" if info.default_weights else "",
    }


def _frames(spec: InputSpec) -> str:
    return f"{spec.num_frames}" if spec.min_frames is None else f"{spec.num_frames} ({spec.min_frames} or more)"


def _show(rows: list[dict[str, Any]]) -> None:
    """A table in a terminal, Markdown where the output is a file or a pipe."""
    from rich.console import Console
    from rich.table import Table

    from sidestream.report.table import markdown_table

    console = Console()
    if not console.is_terminal:
        print(markdown_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows]))
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)


def _stream(model: Any, delay_ticks: int) -> str:
    if not hasattr(model, "streaming"):
        return "sliding window"
    period = model.streaming().period_ticks
    late = f", {delay_ticks} ticks late" if delay_ticks else ""
    return ("an answer every tick" if period == 1 else f"an answer every {period} ticks") + late
