"""The true sentences of the design, one checker for each kind of thing. A new member joins by one line in a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sidestream.circuit.ages import information_latency_ticks, latency_ticks
from sidestream.circuit.stage import Stages
from sidestream.circuit.wire import Circuit
from sidestream.engine.run import run
from sidestream.types import Output


def assert_equal(actual: Any, expected: Any, what: str = "value") -> None:
    """The same structure, and every tensor leaf equal to the bit (NaN equals NaN)."""
    actual_leaves, actual_spec = pytree.tree_flatten(actual)
    expected_leaves, expected_spec = pytree.tree_flatten(expected)
    assert actual_spec == expected_spec, f"{what}: structure {actual_spec} instead of {expected_spec}"
    for n, (a, e) in enumerate(zip(actual_leaves, expected_leaves, strict=True)):
        if isinstance(e, torch.Tensor):
            assert a.shape == e.shape, f"{what}[{n}]: shape {tuple(a.shape)} instead of {tuple(e.shape)}"
            assert a.dtype == e.dtype, f"{what}[{n}]: {a.dtype} instead of {e.dtype}"
            same = torch.equal(torch.nan_to_num(a), torch.nan_to_num(e)) and torch.equal(a.isnan(), e.isnan())
            assert same, f"{what}[{n}]: differs by up to {(a - e).abs().max()}"
        else:
            assert a == e, f"{what}[{n}]: {a!r} instead of {e!r}"


def check_cut(stages: Stages, model: Any, *args: Any, **kwargs: Any) -> None:
    """A cut's sentence: the stages in a row == the model, to the bit; asked twice, since nothing is left behind."""
    with torch.no_grad():
        expected = model(*args, **kwargs)
        for attempt in ("first call", "second call"):
            assert_equal(stages(*args, **kwargs), expected, attempt)


def check_wiring(circuit: Circuit, stages: Stages, frames: Sequence[Any]) -> None:
    """An aligned wiring's sentence: every frame answered once, in order, by the model's own answer, shifted by
    the circuit's latency."""
    state = stages.init_state()
    expected = []
    for frame in frames:
        args = frame if isinstance(frame, tuple) else (frame,)
        with torch.no_grad():
            value, state = stages.step(state, *args)
        expected.append(value)
    outputs = list(run(circuit, frames, executor="inline"))
    assert [o.frame_index for o in outputs] == list(range(len(frames)))
    for output, value in zip(outputs, expected, strict=True):
        assert_equal(output.value, value, f"frame {output.frame_index}")
        assert output.tick == output.frame_index + latency_ticks(circuit)
        assert output.age_ticks == latency_ticks(circuit) == information_latency_ticks(circuit)
        assert output.newest_frame_index == output.oldest_frame_index == output.frame_index


def check_executor(executor: str, circuit: Circuit, frames: Sequence[Any], **options: Any) -> list[Output]:
    """An executor's sentence: equals ``inline``, to the bit, time stamps aside; every frame once, in order."""
    expected = list(run(circuit, frames, executor="inline"))
    actual = list(run(circuit, frames, executor=executor, **options))
    assert [o.frame_index for o in actual] == [o.frame_index for o in expected] == list(range(len(frames)))
    is_shifted = executor in ("sequential", "frame-parallel", "auto")  # these run without the wiring's delays
    for a, e in zip(actual, expected, strict=True):
        assert_equal(a.value, e.value, f"frame {a.frame_index}")
        assert (a.oldest_frame_index, a.newest_frame_index) == (e.oldest_frame_index, e.newest_frame_index)
        assert a.is_warm_up == e.is_warm_up
        assert is_shifted or (a.tick, a.age_ticks) == (e.tick, e.age_ticks)
    return actual
