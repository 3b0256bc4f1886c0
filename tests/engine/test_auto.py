"""Choosing an executor, from numbers; and tuning a real small model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from contract import assert_equal
from sidestream import pipelined
from sidestream.circuit.cut import cut
from sidestream.clock import ManualClock
from sidestream.engine import run
from sidestream.engine.auto import CANDIDATES, Trial, choose, measure, pick
from sidestream.engine.tune import tune
from sidestream.errors import CircuitError, InputError, MissingExtraError

FAST = Trial("frame-parallel", 60.0, 0.033)
QUICK = Trial("sequential", 40.0, 0.025)
SLOW = Trial("threads", 20.0, 0.010)


@pytest.mark.parametrize(
    ("frame_rate", "best", "why"),
    [
        (None, FAST, "highest throughput"),
        (25.0, QUICK, "lowest latency among those that keep up with 25 frames/s"),
        (10.0, SLOW, "lowest latency among those that keep up with 10 frames/s"),
        (39.0, FAST, "keep up with 39"),  # 40 is within 5 % of 39: too close to count on
        (100.0, FAST, "none keeps up with 100 frames/s; fastest"),
    ],
)
def test_pick(frame_rate: float | None, best: Trial, why: str) -> None:
    found, reason = pick((QUICK, SLOW, FAST), frame_rate)
    assert found is best
    assert why in reason


@dataclass(frozen=True)
class Answer:
    latency_seconds: float


class FakeRuns:
    """Executors whose answers take the times given, the last one over and over; counts what they were asked for."""

    def __init__(self, **seconds: list[float]) -> None:
        self.clock = ManualClock()
        self.seconds = {name.replace("_", "-"): times for name, times in seconds.items()}
        self.num_answers: dict[str, int] = {}

    def __call__(self, executor: str, items: Iterator[Any]) -> Iterator[Any]:
        self.num_answers[executor] = 0
        for number, _ in enumerate(items):
            times = self.seconds[executor]
            self.num_answers[executor] += 1
            seconds = times[min(number, len(times) - 1)]
            self.clock.advance(seconds)
            yield Answer(seconds)


@pytest.mark.parametrize(
    ("times", "num_answers", "rate", "latency", "too_few"),
    [
        ([0.01], 100, 100.0, 0.01, 0),  # 0.25 s of warm-up and 0.75 s
        ([0.4, 0.2], 2 + 4, 5.0, 0.2, 0),
        ([0.5], 2 + 2, 2.0, 0.5, 0),
        ([0.75], 3, 4 / 3, 0.75, 3),  # the third is under way when the two seconds are over
        ([1.5], 2, 1 / 1.5, 1.5, 2),
        ([15.0], 1, 1 / 15, 15.0, 1),  # not asked for a second time
        ([1.0, 9.0], 2, 2 / 10, 9.0, 2),  # the latency of the first, in which everything is cold, is left out
        ([1.99, 0.01, 1.99], 2, 2 / 2, 0.01, 2),  # two workers: two at once, and then a wait
    ],
)
def test_a_trial_is_bounded_by_its_time_and_has_one_answer_at_least(
    times: list[float], num_answers: int, rate: float, latency: float, too_few: int
) -> None:
    runs = FakeRuns(threads=times)
    trial = measure("threads", None, runs, 1.0, clock=runs.clock)
    assert runs.num_answers == {"threads": num_answers}
    assert trial.frames_per_second == pytest.approx(rate, rel=0.02)
    assert trial.latency_seconds == latency
    assert trial.too_few == too_few


def test_a_slow_candidate_costs_one_answer_and_the_reason_says_so() -> None:
    runs = FakeRuns(threads=[0.02], frame_parallel=[0.025], sequential=[15.0, 4.0])
    circuit = pipelined(cut(small_model(), torch.rand(1, 3, 32, 32), num_stages=2))
    choice = choose(circuit, None, runs, clock=runs.clock)
    assert tuple(runs.num_answers) == CANDIDATES  # the one that may wait for other programs comes last
    assert runs.num_answers["sequential"] == 1
    assert runs.clock.now() < 15.0 + 1.5
    assert choice.executor == "threads"
    told = {t.name: (round(t.frames_per_second, 1), round(t.latency_seconds, 2), t.basis) for t in choice.trials}
    assert told["sequential"] == (0.1, 15.0, "by 1 answer only")
    assert told["threads"] == (50.0, 0.02, "")


def small_model() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 28 * 28, 7)]
    return nn.Sequential(*layers).eval()


def test_tune_keeps_a_circuit_that_answers_like_the_model() -> None:
    model, frame = small_model(), torch.rand(1, 3, 32, 32)
    said: list[str] = []
    tuned = tune(model, frame, backends=("eager", "openvino"), seconds=0.2, on_progress=said.append)
    assert tuned.backend in ("eager", "openvino")
    assert any(text.startswith("eager") for text in said)
    assert any(text.startswith("openvino") for text in said)
    assert {t.setting.split(" in ")[0] for t in tuned.trials} == {"eager", "openvino"}
    best = max(tuned.trials, key=lambda t: t.frames_per_second)
    assert best.executor == tuned.executor
    outputs = list(run(tuned.circuit, [frame, 2 * frame], executor=tuned.executor))
    with torch.no_grad():
        for output, given in zip(outputs, (frame, 2 * frame), strict=True):
            torch.testing.assert_close(output.value.clone(), model(given), rtol=1e-4, atol=1e-5)


def test_a_given_number_of_stages_is_kept() -> None:
    model, frame = small_model(), torch.rand(1, 3, 32, 32)
    tuned = tune(model, frame, num_stages=3, backends=("eager",), seconds=0.1)
    assert tuned.circuit.num_stages == 3
    assert {t.executor for t in tuned.trials} == {"sequential", "frame-parallel", "threads"}
    outputs = list(run(tuned.circuit, [frame], executor="inline"))
    with torch.no_grad():
        assert_equal(outputs[0].value, model(frame))


def test_nothing_is_measured_twice_where_one_stage_is_enough() -> None:
    tuned = tune(small_model(), torch.rand(1, 3, 32, 32), backends=("eager",), seconds=0.1, num_threads=1)
    assert [(trial.setting, trial.executor) for trial in tuned.trials] == [("eager in 1 stage", "sequential")]


def test_a_named_back_end_that_is_not_there_is_an_error_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from sidestream.engine.backends import BACKENDS

    with pytest.raises(InputError, match="unknown back end 'tensorrt'"):
        tune(small_model(), torch.rand(1, 3, 32, 32), backends="tensorrt")
    gone = replace(BACKENDS["openvino"], missing=lambda: "openvino")
    monkeypatch.setitem(BACKENDS, "openvino", gone)
    with pytest.raises(MissingExtraError, match=r"sidestream\[openvino\]"):
        tune(small_model(), torch.rand(1, 3, 32, 32), backends="openvino")


class Counting(nn.Module):
    """A model with memory in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1.0)
        return x.mean() + self.count


def test_trying_out_a_model_with_memory_in_its_buffers_leaves_no_trace() -> None:
    model, frame = Counting().eval(), torch.zeros(1, 3, 4, 4)
    tuned = tune(model, frame, backends="auto", seconds=0.1)
    assert {t.executor for t in tuned.trials} <= {"threads", "sequential"}
    assert tuned.backend == "eager"
    for _ in range(2):  # each run begins with the state that the model has
        running = run(tuned.circuit, [frame] * 4, executor="auto")
        assert [float(o.value) for o in running] == [1.0, 2.0, 3.0, 4.0]
    assert float(model.count) == 0.0
    with pytest.raises(CircuitError, match="stages with state"):
        run(tuned.circuit, [frame], executor="frame-parallel")


def test_no_back_end_is_refused() -> None:
    with pytest.raises(InputError, match="backends is empty"):
        tune(small_model(), torch.rand(1, 3, 32, 32), backends=())
