"""Stage back ends: the same stage, run by eager PyTorch, TorchInductor, ONNX Runtime or OpenVINO."""

from sidestream.engine.backends.rebalance import cut_for_backend
from sidestream.engine.backends.registry import (
    BACKENDS,
    Backend,
    available_backends,
    compile_stages,
    require_backend,
)
from sidestream.engine.backends.tensors import BackendOptions

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendOptions",
    "available_backends",
    "compile_stages",
    "cut_for_backend",
    "require_backend",
]
