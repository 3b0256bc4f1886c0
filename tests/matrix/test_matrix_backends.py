"""Every model with memory, on every back end, in 1, 2 and 5 stages, on every executor: what it gives in eager, up to
rounding, or the refusal that a table names; and through ``sidestream run --backend``.

By default a covering selection of a small model on ONNX Runtime and OpenVINO; ``-m slow``: all.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from matrix.axes import BACKENDS, QUICK_STREAMS, STREAMS, computes_otherwise
from matrix.covering import covering_rows
from matrix.subject import Answers, OneThread, Subject, subject_of
from torch import Tensor

import sidestream as ss
from sidestream.circuit.stage import Stages
from sidestream.cli import main
from sidestream.errors import BackendError
from sidestream.nn.combine import Chain
from sidestream.nn.steppable import step_through

STAGES = ["1", "2", "5"]
EXECUTORS = ["inline", "threads", "sequential"]
AXES = {"model": QUICK_STREAMS, "backend": BACKENDS[:2], "stages": STAGES, "executor": EXECUTORS}
ROUNDING, CONDITIONING = 1e-3, 50
"""As the check of a converted stage: of the largest value, or so many times what eager moves by itself."""
Converted = dict[tuple[str, str, str], tuple[Subject, Stages]]


@pytest.fixture(scope="module")
def kept() -> Converted:
    """The stages of rows that differ in their executor only."""
    return {}


def converted(model: str, backend: str, num_stages: str, kept: Converted) -> tuple[Subject, Stages]:
    place = model, backend, num_stages
    if place not in kept:
        subject = next((one for (name, *_), (one, _) in kept.items() if name == model), None)
        subject = subject or subject_of(model, Path())
        stages = ss.cut(subject.net, subject.frames[0], num_stages=int(num_stages), check="once")
        kept[place] = subject, ss.compile_stages(stages, backend)
    return kept[place]


@torch.no_grad()
def moved(subject: Subject) -> float:
    """How far the answers move when the frames are off by rounding."""
    chance = torch.Generator().manual_seed(0)
    noisy = [frame * (1 + 1e-6 * torch.randn(frame.shape, generator=chance)) for frame in subject.frames]
    with OneThread():
        found, _ = step_through(subject.net, torch.stack(noisy, 1), and_finish=True)  # type: ignore[arg-type]
    return max(float((a - b).abs().max()) for a, (_, b) in zip(found.unbind(1), subject.of_frames, strict=True))


def check(found: Answers, expected: Answers, limit: float) -> None:
    assert [n for n, _ in found] == [n for n, _ in expected]
    for (n, answer), (_, value) in zip(found, expected, strict=True):
        assert isinstance(answer, Tensor)
        apart, largest = float((answer - value).abs().max()), float(value.abs().max())
        assert apart <= max(ROUNDING * largest, CONDITIONING * limit), f"frame {n}: {apart:.1e} of {largest:.1e}"


def check_row(row: tuple[str, ...], kept: Converted) -> None:
    model, backend, num_stages, executor = row
    if (why := computes_otherwise(model, backend)) is not None:
        with pytest.raises(BackendError, match=why):
            converted(model, backend, num_stages, kept)
        return
    subject, stages = converted(model, backend, num_stages, kept)
    assert [stage.backend for stage in stages] == [backend] * int(num_stages)
    with ss.run(ss.pipelined(stages), subject.frames, executor=executor) as outputs:
        found = [(output.frame_index, output.value) for output in outputs]
    check(found, subject.of_frames, moved(subject))


@pytest.mark.parametrize("row", covering_rows(AXES, lambda row: True), ids="-".join)
def test_a_selection(row: tuple[str, ...], kept: Converted) -> None:
    check_row(row, kept)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", STREAMS)
def test_the_whole_product(model: str, backend: str) -> None:
    """All rows of a model; those that fail are named, all of them."""
    kept: Converted = {}
    failures = []
    if not isinstance(subject_of(model, Path()).net, Chain):
        pytest.skip("it looks at each frame by itself: a graph")
    for row in product([model], [backend], STAGES, EXECUTORS):
        try:
            check_row(row, kept)
        except (Exception, pytest.fail.Exception) as error:
            failures.append(f"{'-'.join(row)}: {type(error).__name__}: {str(error)[:300]}")
    assert not failures, "\n".join(failures)


def check_command(model: str, backend: str, num_stages: str, folder: Path) -> None:
    subject, lines = subject_of(model, folder / "model"), folder / "answers.jsonl"
    flags = ["run", subject.source, "--model", str(subject.saved()), "--json", str(lines), "--top-k", "100000"]
    code = main([*flags, "--backend", backend, "--stages", num_stages, "--executor", "threads"])
    if computes_otherwise(model, backend):
        assert code == 2
        return
    assert code == 0
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    found = [(r["frame"], torch.tensor([[t["logit"] for t in sorted(r["top"], key=_index)]])) for r in records]
    check(found, subject.of_video, moved(subject))


def _index(entry: dict[str, int]) -> int:
    return entry["index"]


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_by_command(backend: str, tmp_path: Path) -> None:
    check_command(QUICK_STREAMS[0], backend, "1", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("num_stages", ["2", "5"])
@pytest.mark.parametrize("model", STREAMS)
def test_all_by_command(model: str, num_stages: str, backend: str, tmp_path: Path) -> None:
    check_command(model, backend, num_stages, tmp_path)
