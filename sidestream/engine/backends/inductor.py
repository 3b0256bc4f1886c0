"""The TorchInductor back end: ``torch.compile`` makes C++ of every stage (frozen: weights become constants)."""

from __future__ import annotations

import os
import shutil
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.circuit.stage import Stage
from sidestream.engine.backends.check import check, handed_through, owned
from sidestream.engine.backends.tensors import BackendOptions, TensorModule, cannot, converted, draw_plan
from sidestream.errors import BackendError


def missing() -> str | None:
    """Why this back end cannot be used here, or None."""
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if any(shutil.which(name) for name in compilers):
        return None
    return f"no C++ compiler found ({' or '.join(compilers)} on PATH); install one, or set CXX"


def compile_stage(stage: Stage, options: BackendOptions) -> Stage:
    """``stage`` compiled for its example's shapes; thread-safe. Raises BackendError when it cannot be compiled."""
    if options.precision != "float32":
        raise cannot(stage.name, "inductor", f"it has no precision {options.precision!r} here, only 'float32'")
    plan = draw_plan(stage, "inductor")
    if not plan.expected:
        return handed_through(stage, plan, "inductor", options)
    # The plan checks shapes and types, so Dynamo's guards are dropped: no thread ever recompiles because its thread
    # count or gradient mode differs. Dynamo files its results by code object: each stage needs one of its own.
    compiled = torch.compile(
        _with_own_code(TensorModule(plan)),
        fullgraph=True,
        dynamic=False,
        options={
            "freezing": True,
            "cpp.threads": options.num_threads,
            "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
        },
    )

    layouts = [(tensor.shape, tensor.stride()) for tensor in plan.tensors]

    def run(tensors: list[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return compiled(*[_laid_out(tensor, *layout) for tensor, layout in zip(tensors, layouts, strict=True)])

    try:
        with _intra_op_threads(options.num_threads):
            runtime = owned(plan, run)
            check(plan, "inductor", runtime, level=options.check)
    except BackendError:
        raise
    except Exception as error:
        raise cannot(stage.name, "inductor", f"{type(error).__name__}: {error}") from error
    return converted(stage, plan, "inductor", runtime)


def _laid_out(tensor: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """``tensor`` in the memory layout that the code was made for."""
    return tensor if tensor.stride() == stride else tensor.new_empty_strided(shape, stride).copy_(tensor)


def _with_own_code(module: nn.Module) -> Callable[..., Any]:
    def call(*tensors: Tensor) -> Any:
        return module(*tensors)

    return types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)


@contextmanager
def _intra_op_threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
