"""What a user would write for a model with memory: its step by hand, in PyTorch, or exported once with the tensors of
its state as inputs and outputs and run in ONNX Runtime or OpenVINO."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sidestream.nn.steppable import Steppable

Tick = Callable[[], None]


class ExportedStep(nn.Module):
    """``forward(frame, *state tensors)`` of a stream in its steady state: what is no tensor is fixed."""

    def __init__(self, stream: Steppable, state: Any) -> None:
        super().__init__()
        self.stream = stream
        self._leaves, self._spec = pytree.tree_flatten(state)
        self.places = [n for n, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]

    @property
    def tensors(self) -> list[Tensor]:
        return [self._leaves[n] for n in self.places]

    def forward(self, frame: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self._leaves)
        for n, tensor in zip(self.places, tensors, strict=True):
            leaves[n] = tensor
        answer, state = self.stream.step(frame, pytree.tree_unflatten(leaves, self._spec))
        after = pytree.tree_leaves(state)
        return (answer, *(after[n] for n in self.places))


def steady_state(stream: Steppable, frame: Tensor, num_ticks: int = 20) -> Any:
    """The state of a stream that has been running for a while."""
    state = stream.init_state(frame)
    with torch.inference_mode():
        for _ in range(num_ticks):
            _, state = stream.step(frame, state)
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, state)


def eager(stream: Steppable, frame: Tensor, num_threads: int) -> Tick:
    """The step, tick by tick."""
    state = [steady_state(stream, frame)]

    def tick() -> None:
        torch.set_num_threads(num_threads)
        with torch.inference_mode():
            _, state[0] = stream.step(frame, state[0])

    return tick


def compiled(stream: Steppable, frame: Tensor, num_threads: int) -> Tick:
    """The step through ``torch.compile``, weights frozen."""
    step = ExportedStep(stream, steady_state(stream, frame)).eval()
    torch.set_num_threads(num_threads)
    program = torch.compile(step, fullgraph=True, dynamic=False, options={"freezing": True})
    state = [tuple(step.tensors)]

    def tick() -> None:
        torch.set_num_threads(num_threads)
        with torch.inference_mode():
            state[0] = program(frame, *state[0])[1:]

    tick()
    return tick


def onnx_of(stream: Steppable, frame: Tensor) -> tuple[bytes, list[np.ndarray]]:
    """The exported step, and a state to begin with."""
    step = ExportedStep(stream, steady_state(stream, frame)).eval()
    file = io.BytesIO()
    with torch.no_grad():
        program: Any = torch.onnx.export(step, (frame, *step.tensors), dynamo=True, verbose=False)
    program.save(file)
    return file.getvalue(), [tensor.numpy() for tensor in step.tensors]


def onnxruntime_step(model: bytes, state: list[np.ndarray], frame: Tensor, num_threads: int) -> Tick:
    """One session; every state goes in and out as an array."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names, now, image = [i.name for i in session.get_inputs()], [state], frame.numpy()

    def tick() -> None:
        now[0] = session.run(None, dict(zip(names, [image, *now[0]], strict=True)))[1:]

    return tick


def openvino_step(model: bytes, state: list[np.ndarray], frame: Tensor, num_threads: int) -> Tick:
    """One request with the latency hint; float32 forced."""
    import openvino

    core = openvino.Core()
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": num_threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(model), "CPU", options).create_infer_request()
    now, image = [state], frame.numpy()

    def tick() -> None:
        answers = request.infer([image, *now[0]])
        now[0] = [np.array(value) for value in list(answers.values())[1:]]

    return tick
