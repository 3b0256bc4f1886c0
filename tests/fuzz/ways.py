"""Every way to run a model that was cut, each held against the plain model's answers, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import sidestream as ss
from fuzz.program import Program, build
from sidestream.circuit.stage import Stages
from sidestream.circuit.wire import Circuit
from sidestream.engine.run import Run


@dataclass
class Case:
    """A program that was cut, and what the plain model answers to its frames."""

    program: Program
    model: nn.Module
    stages: Stages
    expected: list[Any]
    frames: list[Any] = field(default_factory=list)

    def run(self, circuit: Circuit, executor: str) -> Run:
        num_threads = 1 if executor == "sequential" else 2  # there they are threads inside of operators
        return ss.run(circuit, self.frames, executor=executor, num_threads=num_threads)

    def hold(self, answers: Sequence[Any], expected: Sequence[Any] | None = None) -> None:
        """Raise AssertionError at the first answer that differs."""
        expected = self.expected if expected is None else expected
        for index, (given, wanted) in enumerate(zip(answers, expected)):
            if (reason := difference(given, wanted)) is not None:
                raise AssertionError(f"the answer to frame {index} {reason}")
        if len(answers) != len(expected):
            raise AssertionError(f"{len(answers)} answers to {len(expected)} frames")


def difference(given: Any, wanted: Any) -> str | None:
    """In what two answers differ; None when they are equal to the bit, structure included (NaN equals NaN)."""
    a, a_spec = pytree.tree_flatten(given)
    b, b_spec = pytree.tree_flatten(wanted)
    if a_spec != b_spec:
        return f"has another structure: {a_spec} instead of {b_spec}"
    for n, (x, y) in enumerate(zip(a, b)):
        if not isinstance(y, Tensor) or not isinstance(x, Tensor):
            if type(x) is not type(y) or x != y:
                return f"has another leaf {n}: {x!r} instead of {y!r}"
        elif (x.shape, x.dtype) != (y.shape, y.dtype):
            return f"has another leaf {n}: {tuple(x.shape)}, {x.dtype} instead of {tuple(y.shape)}, {y.dtype}"
        elif not torch.equal(x.isnan(), y.isnan()) or not torch.equal(_numbers(x), _numbers(y)):
            most = (_numbers(x).double() - _numbers(y).double()).abs().max()
            return f"has other values in leaf {n}: by up to {most:.3g}"
    return None


def _numbers(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), torch.zeros_like(x), x)


def call_of(frame: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A frame as positional and keyword arguments."""
    if isinstance(frame, dict):
        return (), frame
    return (frame if isinstance(frame, tuple) else (frame,)), {}


def copied(value: Any) -> Any:
    """With every tensor copied."""
    return pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, value)


def _row(case: Case) -> None:
    """The stages called like the model, twice: each call is a new stream."""
    for _ in range(2):
        args, kwargs = call_of(case.frames[0])
        case.hold([copied(case.stages(*args, **kwargs))], case.expected[:1])


def _steps(case: Case) -> None:
    """Steps with the state as a value; an old state stays valid."""
    state, answers, states = case.stages.init_state(), [], []
    for frame in case.frames:
        args, kwargs = call_of(frame)
        states.append(state)
        answer, state = case.stages.step(state, *args, **kwargs)
        answers.append(answer)
    case.hold(answers)
    middle = len(answers) // 2
    args, kwargs = call_of(case.frames[middle])
    again, _ = case.stages.step(states[middle], *args, **kwargs)
    if (reason := difference(again, case.expected[middle])) is not None:
        raise AssertionError(f"the answer from an old state {reason}")


def _runs(executor: str, wiring: Callable[[Stages], Circuit] = ss.pipelined, times: int = 1) -> Callable[[Case], None]:
    def check(case: Case) -> None:
        circuit = wiring(case.stages)
        for _ in range(times):
            case.hold([out.value for out in case.run(circuit, executor)])

    return check


def _interleaved(case: Case) -> None:
    """Two runs of one circuit, advanced in turns."""
    circuit = ss.pipelined(case.stages)
    first, second = case.run(circuit, "inline"), case.run(circuit, "threads")
    answers: tuple[list[Any], list[Any]] = ([], [])
    for a, b in zip(first, second):
        answers[0].append(a.value)
        answers[1].append(b.value)
    case.hold(answers[0])
    case.hold(answers[1])


def _closed(case: Case) -> None:
    """A run that is closed after two answers does not disturb the next."""
    circuit = ss.pipelined(case.stages)
    for executor in ("inline", "threads"):
        with case.run(circuit, executor) as outputs:
            case.hold([next(outputs).value, next(outputs).value], case.expected[:2])
    case.hold([out.value for out in case.run(circuit, "inline")])


def _reused(case: Case) -> None:
    """A source that brings all frames in the same tensors."""
    held = pytree.tree_map(lambda x: x.clone(memory_format=torch.contiguous_format), case.frames[0])

    def source() -> Iterator[Any]:
        for frame in case.frames:
            pytree.tree_map(lambda to, x: to.copy_(x), held, frame)
            yield held

    for executor in ("inline", "threads"):
        outputs = ss.run(ss.pipelined(case.stages), source(), executor=executor, num_threads=2)
        case.hold([out.value for out in outputs])


def _written_over(case: Case) -> None:
    """Whoever takes an answer may write over it (but for parameters, and buffers that nobody writes)."""
    own = {t.untyped_storage().data_ptr() for t in (*case.model.parameters(), *case.model.buffers())}
    for executor in ("inline", "threads"):
        answers = []
        for out in case.run(ss.pipelined(case.stages), executor):
            answers.append(copied(out.value))
            for leaf in pytree.tree_leaves(out.value):
                if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in own:
                    with torch.inference_mode():  # in which answers are made
                        leaf.as_strided(_written_shape(leaf), leaf.stride()).fill_(7)
        case.hold(answers)


def _written_shape(x: Tensor) -> list[int]:
    """Without the repetitions of an expanded tensor."""
    return [1 if stride == 0 else size for size, stride in zip(x.shape, x.stride())]


def _frame_parallel(case: Case) -> None:
    """Only for models without state."""
    if not case.stages.is_stateful:
        _runs("frame-parallel")(case)


def _model_is_kept(case: Case) -> None:
    """After all those runs the model is as it was."""
    fresh = build(case.program)
    for kind in ("named_buffers", "named_parameters"):
        now, then = dict(getattr(case.model, kind)()), dict(getattr(fresh, kind)())
        if (reason := difference(now, then)) is not None:
            raise AssertionError(f"the model's {kind.removeprefix('named_')} after the runs: {reason}")


WAYS: dict[str, Callable[[Case], None]] = {
    "called": _row,
    "steps": _steps,
    "inline, twice": _runs("inline", times=2),
    "threads": _runs("threads"),
    "two runs in turns": _interleaved,
    "closed early": _closed,
    "frames in one tensor": _reused,
    "answers written over": _written_over,
    "sequential wiring": _runs("threads", ss.sequential),
    "semi-parallel": _runs("inline", lambda stages: ss.semi_parallel(stages, groups=min(2, len(stages)))),
    "sequential executor": _runs("sequential"),
    "frame-parallel": _frame_parallel,
    "model after the runs": _model_is_kept,
}
