"""Who takes part: every way to run one model on one stream of single frames, set up once and started in every pass.

A candidate's ``start()`` gives a generator with one item per answered frame: its latency in seconds, from the
moment the frame was taken to its answer. The source always has a next frame, so the generator's pace is the throughput.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import rivals
import torch
import torchvision.models
from torch import Tensor, nn

from sidestream.circuit.cut import cut
from sidestream.circuit.stage import Stages
from sidestream.circuit.wire import Circuit
from sidestream.circuit.wiring import pipelined, sequential
from sidestream.engine.backends import compile_stages, cut_for_backend
from sidestream.engine.run import run
from sidestream.engine.tune import tune

MODELS = ("resnet50", "densenet121", "mobilenet_v3_large", "efficientnet_b0", "vit_b_16")
BACKENDS = ("eager", "onnxruntime", "openvino")
STAGE_COUNTS = ("2", "4", "8", "blocks")
AUTO_STAGES = "4"
NUM_FRAMES = 8
REFERENCE = "eager, 1 thread"

Start = Callable[[], Iterator[float]]


@dataclass
class Candidate:
    """One way to run the model. ``make`` sets it up (conversion, compilation) and gives ``start``."""

    name: str
    kind: str
    """"eager" (PyTorch), "rival" (a compiler or runtime by itself), "frame-parallel", "pipelined" or "auto"."""
    make: Callable[[], Start]
    notes: dict[str, Any] = field(default_factory=dict)
    """What a run found out about itself, such as what ``auto`` picked."""


def make_model(name: str, seed: int = 0) -> nn.Module:
    """A torchvision model with random weights, whose batch norms have seen data.

    Without that step the activations of a random network shrink to denormal numbers, which processors are slow at.
    """
    torch.manual_seed(seed)
    model: nn.Module = getattr(torchvision.models, name)(weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 224, 224))
    return model.eval()


def make_frames(seed: int = 0) -> list[Tensor]:
    """Frames BCHW = (1, 3, 224, 224), decoded and normalised beforehand."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 3, 224, 224, generator=generator) for _ in range(NUM_FRAMES)]


def block_names(name: str, model: nn.Module) -> tuple[str, ...]:
    """Where a stage begins when every block is one: all blocks but the first."""
    modules = [path for path, _ in model.named_modules()]
    match name:
        case "resnet50":
            names = [p for p in modules if p.startswith("layer") and p.count(".") == 1]
        case "densenet121":
            starts = ("features.denseblock", "features.transition")
            layers = [p for p in modules if p.startswith(starts[0]) and p.count(".") == 2]
            names = [p for p in modules if p in layers or (p.startswith(starts[1]) and p.count(".") == 1)]
        case "mobilenet_v3_large":
            names = [p for p in modules if p.startswith("features.") and p.count(".") == 1][1:]
        case "efficientnet_b0":
            names = [p for p in modules if p.startswith("features.") and p.count(".") == 2]
            names = [p for p in names if not p.startswith(("features.0.", "features.8."))] + ["features.8"]
        case _:
            names = [p for p in modules if p.startswith("encoder.layers.") and p.count(".") == 2]
    return tuple(names)


class Entry:
    """One model's material, shared by its candidates: frames, cuts, and the ONNX file of the whole."""

    def __init__(self, name: str, num_threads: int) -> None:
        self.name, self.num_threads = name, num_threads
        self.model, self.frames = make_model(name), make_frames()
        self._cuts: dict[str, Stages] = {}
        self._compiled_cuts: dict[tuple[str, str], Stages] = {}

    def cut(self, stages: str) -> Stages:
        """The model in "1", "2" ... balanced stages, or one per block."""
        if stages not in self._cuts:
            options = {"cut": block_names(self.name, self.model)} if stages == "blocks" else {"num_stages": int(stages)}
            self._cuts[stages] = cut(self.model, self.frames[0], name=self.name, **options)  # type: ignore[arg-type]
        return self._cuts[stages]

    def _compiled(self, stages: str, backend: str) -> Stages:
        """Balanced stages are balanced for their back end; blocks are where they are."""
        if (stages, backend) not in self._compiled_cuts:
            if backend == "eager" or stages in ("1", "blocks"):
                found = compile_stages(self.cut(stages), backend)
            else:
                found = cut_for_backend(
                    self.model,
                    self.frames[0],
                    backend,
                    num_stages=int(stages),
                    num_workers=self.num_threads,
                    name=self.name,
                )
            self._compiled_cuts[stages, backend] = found
        return self._compiled_cuts[stages, backend]

    def engine(self, stages: str, backend: str, executor: str, notes: dict[str, Any]) -> Start:
        """The engine on one cut and back end."""
        parts = self._compiled(stages, backend)
        notes["num_stages"] = len(parts)
        circuit = sequential(parts) if stages == "1" else pipelined(parts)
        return lambda: engine_stream(circuit, self.frames, executor, self.num_threads, notes)

    def tuned(self, notes: dict[str, Any]) -> Start:
        """What ``tune`` finds among all back ends, numbers of stages and executors; it is asked once, on set-up."""
        found = tune(self.model, self.frames[0])
        notes["picked"] = f"{found.backend}, {found.circuit.num_stages} stages, {found.executor}"
        return lambda: engine_stream(found.circuit, self.frames, found.executor, self.num_threads, notes)


def engine_stream(
    circuit: Circuit, frames: list[Tensor], executor: str, num_threads: int, notes: dict[str, Any]
) -> Iterator[float]:
    """Latencies of ``sidestream.run`` on an endless stream."""
    with run(circuit, itertools.cycle(frames), executor=executor, num_threads=num_threads) as answers:
        if answers.choice is not None:
            notes["picked"] = answers.choice.executor
        for output in answers:
            yield output.latency_seconds


def candidates(entry: Entry, stage_counts: tuple[str, ...] = STAGE_COUNTS) -> list[Candidate]:
    """All candidates of one model; nothing is converted before ``make`` is called."""
    n, frames = entry.num_threads, entry.frames
    many = f"{n} threads"

    def eager(num_threads: int) -> Callable[[], Start]:
        return lambda: lambda: rivals.torch_stream(entry.model, frames, num_threads)

    def onnx(num_threads: int) -> Callable[[], Start]:
        return lambda: rivals.onnxruntime_start(entry.cut("1")[0], frames, num_threads)

    def openvino(hint: str) -> Callable[[], Start]:
        return lambda: rivals.openvino_start(entry.cut("1")[0], frames, n, hint)

    found = [
        Candidate(REFERENCE, "eager", eager(1)),
        Candidate(f"eager, {many}", "eager", eager(n)),
        Candidate(f"torch.compile, {many}", "rival", lambda: rivals.compiled_start(entry.model, frames, n)),
        Candidate("ONNX Runtime, 1 thread", "rival", onnx(1)),
        Candidate(f"ONNX Runtime, {many}", "rival", onnx(n)),
        Candidate(f"OpenVINO latency, {many}", "rival", openvino("LATENCY")),
        Candidate(f"OpenVINO throughput, {many}", "rival", openvino("THROUGHPUT")),
    ]
    found += [_engine(entry, f"frame-parallel, {b}", "frame-parallel", "1", b, "frame-parallel") for b in BACKENDS]
    for stages, backend in itertools.product(stage_counts, BACKENDS):
        label = "one stage per block" if stages == "blocks" else f"{stages} stages"
        found.append(_engine(entry, f"pipelined, {label}, {backend}", "pipelined", stages, backend, "threads"))
    found += [_engine(entry, f"auto, {b}", "auto", AUTO_STAGES, b, "auto") for b in BACKENDS]
    notes: dict[str, Any] = {}
    return [*found, Candidate("auto, back end too", "auto", lambda: entry.tuned(notes), notes)]


def _engine(entry: Entry, name: str, kind: str, stages: str, backend: str, executor: str) -> Candidate:
    notes: dict[str, Any] = {}
    return Candidate(name, kind, lambda: entry.engine(stages, backend, executor, notes), notes)
