"""The ONNX Runtime back end: one CPU session per stage, run in the thread that calls it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sidestream.circuit.stage import Stage
from sidestream.engine.backends.check import check, handed_through, owned
from sidestream.engine.backends.onnx_export import input_number, missing_exporter, onnx_bytes
from sidestream.engine.backends.tensors import BackendOptions, Runtime, cannot, converted, draw_plan
from sidestream.errors import BackendError


def missing() -> str | None:
    """The package that is not installed, or None."""
    return "onnxruntime" if importlib.util.find_spec("onnxruntime") is None else missing_exporter()


def compile_stage(stage: Stage, options: BackendOptions) -> Stage:
    """``stage`` on ONNX Runtime; thread-safe. Raises BackendError when it cannot be converted."""
    if options.precision != "float32":
        raise cannot(stage.name, "onnxruntime", f"it has no precision {options.precision!r} here, only 'float32'")
    plan = draw_plan(stage, "onnxruntime")
    if not plan.expected:
        return handed_through(stage, plan, "onnxruntime", options)
    onnx_model = onnx_bytes(plan, "onnxruntime")
    try:
        runtime = owned(plan, session_runtime(session(onnx_model, num_threads=options.num_threads)))
        check(plan, "onnxruntime", runtime, level=options.check)
    except BackendError:
        raise
    except Exception as error:
        raise cannot(stage.name, "onnxruntime", f"{type(error).__name__}: {error}") from error
    return converted(stage, plan, "onnxruntime", runtime)


def session(onnx_model: bytes, *, num_threads: int = 1) -> Any:
    """A CPU ``InferenceSession`` with all graph optimisations; with one thread it has no pool of its own."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(onnx_model, options, providers=["CPUExecutionProvider"])


def session_runtime(inference_session: Any) -> Runtime:
    """Tensors in and out of a session: inputs are views where contiguous, outputs are the session's new arrays."""
    feeds = [(value.name, input_number(value.name)) for value in inference_session.get_inputs()]

    def runtime(tensors: list[Tensor]) -> Sequence[Tensor]:
        arrays = {name: tensors[n].detach().contiguous().numpy() for name, n in feeds}
        return [torch.from_numpy(array) for array in inference_session.run(None, arrays)]

    return runtime
