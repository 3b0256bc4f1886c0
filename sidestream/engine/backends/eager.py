"""The eager back end: PyTorch itself, every stage as it was cut."""

from __future__ import annotations

from sidestream.circuit.stage import Stage
from sidestream.engine.backends.tensors import BackendOptions, cannot


def missing() -> str | None:
    """Always there."""
    return None


def compile_stage(stage: Stage, options: BackendOptions) -> Stage:
    """``stage`` itself. Raises BackendError for another precision than float32."""
    if options.precision != "float32":
        raise cannot(stage.name, "eager", f"it has no precision {options.precision!r}, only 'float32' (as cut)")
    return stage
