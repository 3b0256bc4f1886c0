"""A stage's plan as ONNX bytes, in memory: what ONNX Runtime and OpenVINO both read."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator

import torch

from sidestream.engine.backends.tensors import Plan, TensorModule, cannot

INPUT = "input_"
OPSET = 20
"""Read by ONNX Runtime from 1.17 and OpenVINO from 2024.1 on."""
DTYPES = frozenset({torch.float32, torch.float16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool})


def missing_exporter() -> str | None:
    """The package that PyTorch's ONNX exporter lacks here, or None."""
    return next((name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None), None)


def input_number(*names: str) -> int:
    """Which tensor the runtime's input of these names is: 3 for "input_3"."""
    return next(int(name.removeprefix(INPUT)) for name in names if name.startswith(INPUT))


def onnx_bytes(plan: Plan, backend: str) -> bytes:
    """The ONNX model of ``plan``, inputs named input_0, input_1 and on. Raises BackendError when it cannot."""
    dtypes = DTYPES | {torch.float64} if backend == "onnxruntime" else DTYPES
    for value in (*plan.tensors, *plan.expected):
        if value.dtype not in dtypes:
            raise cannot(plan.name, backend, f"it has tensors of type {value.dtype} on its border")
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                TensorModule(plan),
                tuple(plan.tensors),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[f"{INPUT}{n}" for n in range(len(plan.fed))],
                output_names=[f"output_{n}" for n in range(len(plan.expected))],
            )
        assert program is not None
        return program.model_proto.SerializeToString()
    except Exception as error:
        raise cannot(plan.name, backend, f"it cannot be exported to ONNX ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    """The cause at the root of an exporter's nested errors, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns and prints about its own business; a real failure is an exception."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
