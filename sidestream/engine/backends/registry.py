"""The table of back ends, and ``compile_stages``: every stage of a cut model on one of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sidestream.circuit.stage import Stage, Stages
from sidestream.engine.backends import eager, inductor, ort, ov
from sidestream.engine.backends.stateful import needs_ticks, programmed, ticks_of
from sidestream.engine.backends.tensors import BackendOptions, Level
from sidestream.errors import BackendError, MissingExtraError

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""``on_progress(done, total, name)``: called before each stage and once when all are done."""


@dataclass(frozen=True)
class Backend:
    """One way to run a stage."""

    compile_stage: Callable[[Stage, BackendOptions], Stage]
    missing: Callable[[], str | None]
    """What is not installed here, or None."""
    extra: str | None = None
    """The extra of this package that installs it."""


BACKENDS: dict[str, Backend] = {
    "eager": Backend(eager.compile_stage, eager.missing),
    "inductor": Backend(inductor.compile_stage, inductor.missing),
    "onnxruntime": Backend(ort.compile_stage, ort.missing, "onnxruntime"),
    "openvino": Backend(ov.compile_stage, ov.missing, "openvino"),
}


def available_backends() -> dict[str, str | None]:
    """Every back end's name with None when it can be used here, else the reason why not."""
    return {name: _why_not(backend) for name, backend in BACKENDS.items()}


def compile_stages(
    stages: Stages,
    backend: str = "eager",
    *,
    precision: str = "float32",
    num_threads: int = 1,
    check: Level = "full",
    on_unsupported: Literal["error", "eager"] = "error",
    on_progress: Progress | None = None,
) -> Stages:
    """The same stages and links, every stage run by ``backend``.

    A state that is a value (streaming layers) goes in and out of the runtime, and is what it is in eager; state in
    buffers of modules cannot be converted. A converted stage takes tensors of its example's shapes and types in any
    memory layout, gives outputs that stay valid, and refuses to run once its weights have changed.

    ``check``: on what each converted stage is compared with eager. "full": its example, and up to twelve inputs with
    other values (``backends/check.py``), which takes four runs of both and then at most about a second of work;
    "once": the example alone; "off": nothing.
    ``precision``: "float32", or "bfloat16" (openvino only) for the arithmetic inside of a stage.
    ``num_threads``: threads inside one stage. ``on_unsupported``: "eager" keeps what cannot be converted in eager.

    Raises BackendError (unknown back end, or a stage that it cannot run) and MissingExtraError.
    """
    chosen = require_backend(backend)
    _check_choice(on_unsupported, num_threads, check)
    options = BackendOptions(precision=precision, num_threads=num_threads, check=check)
    if backend == "eager":
        return stages.with_stages(tuple(chosen.compile_stage(stage, options) for stage in stages))
    done: list[Stage] = []
    ticks = ticks_of(stages) if stages.example is not None and any(map(needs_ticks, stages)) else None
    for number, stage in enumerate(stages, start=1):
        if on_progress:
            on_progress(len(done), len(stages), stage.name)
        try:
            if ticks is not None and needs_ticks(stage):
                done.append(programmed(stage, ticks[number - 1], chosen.compile_stage, options, backend))
            else:
                done.append(chosen.compile_stage(stage, options))
        except BackendError as error:
            if on_unsupported == "error":
                raise
            log.warning("stage %r stays in eager: %s", stage.name, error)
            done.append(stage)
    if on_progress:
        on_progress(len(done), len(stages), stages.name)
    return stages.with_stages(tuple(done))


def require_backend(name: str) -> Backend:
    """The back end of that name. Raises BackendError (unknown) or MissingExtraError (not installed)."""
    if name not in BACKENDS:
        raise BackendError(f"unknown back end {name!r}; known: {', '.join(BACKENDS)}")
    backend = BACKENDS[name]
    package = backend.missing()
    if package is not None and backend.extra is not None:
        raise MissingExtraError(package, backend.extra, f"the back end {name!r}")
    if package is not None:
        raise BackendError(f"the back end {name!r} cannot be used here: {package}; or use backend='eager'")
    return backend


def _why_not(backend: Backend) -> str | None:
    package = backend.missing()
    if package is None or backend.extra is None:
        return package
    return f"{package} is not installed; pip install 'sidestream[{backend.extra}]'"


def _check_choice(on_unsupported: str, num_threads: int, check: str) -> None:
    if check not in ("full", "once", "off"):
        raise BackendError(f"{check = } is not one of 'full', 'once', 'off'")
    if on_unsupported not in ("error", "eager"):
        raise BackendError(f"{on_unsupported = } is not one of 'error', 'eager'")
    if num_threads < 1:
        raise BackendError(f"{num_threads = }: a stage needs at least one thread")
