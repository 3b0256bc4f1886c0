"""Every model, cut into every number of stages, on every executor, by every way in: the plain model's own answers.

By default a covering selection: each pair of members of two axes comes together, among a few small models (``pytest
-vv`` names the rows). ``-m slow``: the whole product, and all of our own models by name as ``sidestream run`` has them
with its defaults.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from matrix.axes import ENTRANCES, EXECUTORS, MODELS, QUICK, STAGES, Row, no_classes
from matrix.covering import covering_rows, pairs_of
from matrix.entrances import CHECKS, refusal
from matrix.subject import Subject, subject_of
from model_zoo import OWN, spec_of
from torch.utils import _pytree as pytree

from sidestream.cli import main

AXES = {"model": QUICK, "stages": STAGES, "executor": list(EXECUTORS), "entrance": ENTRANCES}


def row_of(members: tuple[str, ...]) -> Row:
    model, num_stages, executor, entrance = members
    return Row(model, int(num_stages), executor, entrance)


def is_possible(row: tuple[str, ...]) -> bool:
    """Whether the row has a meaning: a frame model has no clips. (What is refused has one.)"""
    return row[3] != "clips" or spec_of(row[0]).layout == "BTCHW"


def is_answered(row: tuple[str, ...]) -> bool:
    """Whether the row has a meaning and is not refused: what is refused tests no pair."""
    return is_possible(row) and refusal(row_of(row), spec_of(row[0]).layout) is None


def first_refused() -> list[tuple[str, ...]]:
    """For each model, way in and reason the first row that is refused."""
    found: dict[tuple[object, ...], tuple[str, ...]] = {}
    for row in filter(is_possible, product(*AXES.values())):
        if (wanted := refusal(row_of(row), spec_of(row[0]).layout)) is not None:
            found.setdefault((row[0], row[3], wanted), row)
    return list(found.values())


SELECTED = covering_rows(AXES, is_answered)
REFUSED = first_refused()


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Subject]]:
    """The newest subject; rows of one model come one after the other."""
    kept: dict[str, Subject] = {}
    yield kept
    kept.clear()


def subject(name: str, kept: dict[str, Subject], folder: Path) -> Subject:
    if name not in kept:
        kept.clear()
        kept[name] = subject_of(name, folder / "model")
    return kept[name]


def check(row: Row, subject: Subject, folder: Path) -> None:
    """A row's sentence: refused as the tables say, or answered as the plain model answers."""
    wanted = refusal(row, subject.info.input_spec.layout)
    if wanted is None:
        CHECKS[row.entrance](row, subject, folder)
        return
    error, sentence = wanted
    with pytest.raises(error if row.entrance != "command" else Exception, match=sentence):
        CHECKS[row.entrance](row, subject, folder)


@pytest.mark.parametrize("members", sorted([*SELECTED, *REFUSED], key=lambda row: QUICK.index(row[0])), ids="-".join)
def test_a_selection(
    members: tuple[str, ...], subjects: dict[str, Subject], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("row")
    check(row_of(members), subject(members[0], subjects, folder), folder)


def test_the_selection_covers_every_pair() -> None:
    answered = [row for row in product(*AXES.values()) if is_answered(row)]
    assert {pair for row in answered for pair in pairs_of(row)} == {pair for row in SELECTED for pair in pairs_of(row)}
    assert set(SELECTED) <= set(answered)
    assert len(SELECTED) < len(answered) / 5
    for axis, members in enumerate(AXES.values()):
        assert {row[axis] for row in SELECTED} == set(members)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", MODELS)
def test_the_whole_product(name: str, tmp_path: Path) -> None:
    """All rows of a model; those that fail are named, all of them."""
    one, failures = subject_of(name, tmp_path / "model"), []
    values = [pytree.tree_leaves(value)[0] for _, value in one.of_frames]
    assert not torch.equal(values[0], values[1]), "it answers the same whatever it sees, so that nothing is compared"
    for members in product([name], *list(AXES.values())[1:]):
        if is_possible(members):
            try:
                check(row_of(members), one, tmp_path)
            except (Exception, pytest.fail.Exception) as error:
                failures.append(f"{'-'.join(members)}: {type(error).__name__}: {str(error)[:300]}")
    assert not failures, "\n".join(failures)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("flags", [[], ["--stages", "3", "--executor", "threads"]], ids=["defaults", "3 threads"])
@pytest.mark.parametrize("name", OWN)
def test_by_name_at_its_own_size(
    name: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, lines = spec_of(name), tmp_path / "answers.jsonl"
    num_frames = max(6, ((spec.min_frames or 1) - 1) * spec.frame_step + 1, spec.frame_step + 1)
    common = ["run", f"synthetic:frames={num_frames},size=64x64", "--model", name, "--weights", "random"]
    code = main([*common, *flags, "--json", str(lines)])
    if no_classes(name):
        assert code == 2
        assert capsys.readouterr().err.count("\n") == 1
        return
    assert code == 0
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [r["frame"] for r in records] == sorted({r["frame"] for r in records})
    assert records[0]["frame"] == 0
