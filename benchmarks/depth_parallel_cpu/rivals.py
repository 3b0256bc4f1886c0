"""The rivals, each as its own documentation says to use it: PyTorch, torch.compile, ONNX Runtime, OpenVINO.

All compute in float32. ONNX Runtime and OpenVINO get the same ONNX graph of the whole model. OpenVINO's throughput
hint is used as meant: asynchronous, with as many requests in flight as the compiled model itself asks for.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sidestream.circuit.stage import Stage
from sidestream.engine.backends import ort
from sidestream.engine.backends.onnx_export import onnx_bytes
from sidestream.engine.backends.tensors import draw_plan

Start = Callable[[], Iterator[float]]


def torch_stream(model: Callable[[Tensor], Any], frames: list[Tensor], num_threads: int) -> Iterator[float]:
    """Frame by frame through a PyTorch callable with ``num_threads`` inside each operator."""
    torch.set_num_threads(num_threads)
    for frame in itertools.cycle(frames):
        began = time.perf_counter()
        with torch.inference_mode():
            model(frame)
        yield time.perf_counter() - began


def compiled_start(model: nn.Module, frames: list[Tensor], num_threads: int) -> Start:
    """``torch.compile`` with frozen weights: folds batch norms and packs weights, which the default mode does not."""
    torch.set_num_threads(num_threads)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, options={"freezing": True})
    with torch.inference_mode():
        compiled(frames[0])
    return lambda: torch_stream(compiled, frames, num_threads)


def onnxruntime_start(whole: Stage, frames: list[Tensor], num_threads: int) -> Start:
    """One session, all graph optimisations, ``num_threads`` inside each operator."""
    session = ort.session(onnx_bytes(draw_plan(whole, "onnxruntime"), "onnxruntime"), num_threads=num_threads)
    name, arrays = session.get_inputs()[0].name, [frame.numpy() for frame in frames]

    def stream() -> Iterator[float]:
        for array in itertools.cycle(arrays):
            began = time.perf_counter()
            session.run(None, {name: array})
            yield time.perf_counter() - began

    return stream


def openvino_start(whole: Stage, frames: list[Tensor], num_threads: int, hint: str) -> Start:
    """One compiled model under a performance hint ("LATENCY" or "THROUGHPUT"); its other settings are its own."""
    import openvino

    core = openvino.Core()
    model = core.read_model(onnx_bytes(draw_plan(whole, "openvino"), "openvino"))
    settings = {"PERFORMANCE_HINT": hint, "INFERENCE_NUM_THREADS": num_threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(model, "CPU", settings)
    arrays = [frame.numpy() for frame in frames]
    return lambda: (_asynchronous if hint == "THROUGHPUT" else _synchronous)(compiled, arrays)


def _synchronous(compiled: Any, arrays: list[np.ndarray]) -> Iterator[float]:
    request = compiled.create_infer_request()
    for array in itertools.cycle(arrays):
        began = time.perf_counter()
        request.infer([array], share_inputs=True)
        yield time.perf_counter() - began


def _asynchronous(compiled: Any, arrays: list[np.ndarray]) -> Iterator[float]:
    import openvino

    queue = openvino.AsyncInferQueue(compiled)
    done: deque[float] = deque()

    def answered(request: Any, began: float) -> None:
        np.array(request.get_output_tensor(0).data)
        done.append(time.perf_counter() - began)

    queue.set_callback(answered)
    try:
        for array in itertools.cycle(arrays):
            queue.get_idle_request_id()  # waits until a request is free: that is when the frame is taken
            queue.start_async([array], userdata=time.perf_counter(), share_inputs=True)
            while done:
                yield done.popleft()
    finally:
        queue.wait_all()
