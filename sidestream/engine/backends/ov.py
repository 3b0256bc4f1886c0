"""The OpenVINO back end: one compiled model and one infer request per stage.

An infer request can do one thing at a time, so a twin (``Stage.copy``) has a compiled model of its own: two
requests of one single-stream model would wait for each other. Pinning is off, because every one-thread model
would pin itself to the same first core.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sidestream.circuit.stage import Stage
from sidestream.engine.backends.check import check, handed_through
from sidestream.engine.backends.onnx_export import input_number, missing_exporter, onnx_bytes
from sidestream.engine.backends.tensors import BackendOptions, Plan, Runtime, cannot, converted, draw_plan
from sidestream.errors import BackendError, LayoutError

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
LARGEST_NUMBER = 2**24
"""Whole numbers beyond are rounded by some operators (division, remainder, maximum), beyond 2**31 by all."""


def missing() -> str | None:
    """The package that is not installed, or None."""
    return "openvino" if importlib.util.find_spec("openvino") is None else missing_exporter()


def compile_stage(stage: Stage, options: BackendOptions) -> Stage:
    """``stage`` on OpenVINO; its twin is compiled anew. Raises BackendError when it cannot be converted."""
    if options.precision not in PRECISIONS:
        known = " or ".join(repr(name) for name in PRECISIONS)
        raise cannot(stage.name, "openvino", f"it has no precision {options.precision!r}, only {known}")
    plan = draw_plan(stage, "openvino")
    if not plan.expected:
        return handed_through(stage, plan, "openvino", options)
    onnx_model = onnx_bytes(plan, "openvino")
    try:
        model = read_onnx(onnx_model)
        runtime = request_runtime(model, options)
        check(plan, "openvino", runtime, options.precision, options.check)
    except BackendError:
        raise
    except Exception as error:
        raise cannot(stage.name, "openvino", f"{type(error).__name__}: {error}") from error
    return _with_twins(stage, replace(plan, expected=(), answered=()), model, options, runtime)


def read_onnx(onnx_model: bytes) -> Any:
    """An ``openvino.Model`` from ONNX bytes (``Core.read_model``: nothing is written, nothing is reported home)."""
    return _core().read_model(onnx_model)


def properties(options: BackendOptions) -> dict[str, Any]:
    """What a stage's model is compiled with: ``num_threads`` threads, one stream, no pinning, the precision forced."""
    return {
        "INFERENCE_PRECISION_HINT": PRECISIONS[options.precision],
        "INFERENCE_NUM_THREADS": options.num_threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }


def request_runtime(model: Any, options: BackendOptions) -> Runtime:
    """Tensors in and out of a new compiled model; inputs are shared where contiguous, outputs copied out once."""
    request = _core().compile_model(model, "CPU", properties(options)).create_infer_request()
    feeds = [(port, input_number(*port.get_names())) for port in request.model_inputs]
    num_outputs = len(request.model_outputs)
    lock = threading.Lock()

    def runtime(tensors: list[Tensor]) -> Sequence[Tensor]:
        arrays = {port: _exact(tensors[n]).detach().contiguous().numpy() for port, n in feeds}
        with lock:
            answers = request.infer(arrays, share_inputs=True, share_outputs=False)
        return [torch.from_numpy(answers[n]) for n in range(num_outputs)]

    return runtime


def _with_twins(stage: Stage, plan: Plan, model: Any, options: BackendOptions, runtime: Runtime) -> Stage:
    def twin() -> Stage:
        return _with_twins(stage, plan, model, options, request_runtime(model, options))

    return replace(converted(stage, plan, "openvino", runtime), copy=twin)


def _exact(tensor: Tensor) -> Tensor:
    """``tensor`` as it is. Raises LayoutError for whole numbers that OpenVINO's arithmetic does not hold."""
    if tensor.dtype in (torch.int64, torch.int32) and tensor.numel():
        least, greatest = (int(value) for value in torch.aminmax(tensor))
        if max(-least, greatest) > LARGEST_NUMBER:
            raise LayoutError(
                f"OpenVINO computes whole numbers in 32 bits, partly as floating point: exact up to {LARGEST_NUMBER}, "
                f"but an input holds {least if -least > greatest else greatest}; run this stage in eager"
            )
    return tensor


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()
