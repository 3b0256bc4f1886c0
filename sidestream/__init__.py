"""Sidestream: deep video models on streams.

Cut any PyTorch model by depth, run its stages in parallel, each on a different frame. The names below are loaded
when first used, so that ``import sidestream`` is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sidestream.circuit.chart import chart, chart_png
    from sidestream.circuit.cut import cut
    from sidestream.circuit.forecast import forecast
    from sidestream.circuit.wiring import parallel, pipelined, semi_parallel, sequential, with_feedback, with_periods
    from sidestream.clip_graph.convert import to_stream
    from sidestream.engine.backends import available_backends, compile_stages
    from sidestream.engine.rules.direct import DirectFeedback
    from sidestream.engine.rules.exact import Exact
    from sidestream.engine.rules.forward import Forward
    from sidestream.engine.rules.sideways import Sideways
    from sidestream.engine.run import run, run_many
    from sidestream.engine.tune import tune
    from sidestream.errors import InputError, SidestreamError
    from sidestream.models import create_model, input_spec_of, list_models
    from sidestream.models.pretrained import from_pretrained, push_to_hub, save_pretrained
    from sidestream.nn.feedback_alignment import with_random_feedback
    from sidestream.types import Clip, Frame, InputSpec, Output
    from sidestream.video import overlay, prepare, read, stream, write

__version__ = "0.1.0"

_HOME = {
    "Clip": "types",
    "DirectFeedback": "engine.rules.direct",
    "Exact": "engine.rules.exact",
    "Forward": "engine.rules.forward",
    "Frame": "types",
    "InputError": "errors",
    "InputSpec": "types",
    "Output": "types",
    "SidestreamError": "errors",
    "Sideways": "engine.rules.sideways",
    "available_backends": "engine.backends",
    "chart": "circuit.chart",
    "chart_png": "circuit.chart",
    "compile_stages": "engine.backends",
    "create_model": "models",
    "cut": "circuit.cut",
    "forecast": "circuit.forecast",
    "from_pretrained": "models.pretrained",
    "input_spec_of": "models",
    "list_models": "models",
    "overlay": "video",
    "parallel": "circuit.wiring",
    "pipelined": "circuit.wiring",
    "prepare": "video",
    "push_to_hub": "models.pretrained",
    "read": "video",
    "run": "engine.run",
    "run_many": "engine.run",
    "save_pretrained": "models.pretrained",
    "semi_parallel": "circuit.wiring",
    "sequential": "circuit.wiring",
    "stream": "video",
    "to_stream": "clip_graph.convert",
    "tune": "engine.tune",
    "with_feedback": "circuit.wiring",
    "with_periods": "circuit.wiring",
    "with_random_feedback": "nn.feedback_alignment",
    "write": "video",
}

__all__ = [
    "Clip",
    "DirectFeedback",
    "Exact",
    "Forward",
    "Frame",
    "InputError",
    "InputSpec",
    "Output",
    "SidestreamError",
    "Sideways",
    "available_backends",
    "chart",
    "chart_png",
    "compile_stages",
    "create_model",
    "cut",
    "forecast",
    "from_pretrained",
    "input_spec_of",
    "list_models",
    "overlay",
    "parallel",
    "pipelined",
    "prepare",
    "push_to_hub",
    "read",
    "run",
    "run_many",
    "save_pretrained",
    "semi_parallel",
    "sequential",
    "stream",
    "to_stream",
    "tune",
    "with_feedback",
    "with_periods",
    "with_random_feedback",
    "write",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sidestream' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"sidestream.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
