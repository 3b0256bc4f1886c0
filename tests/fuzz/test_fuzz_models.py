"""Random models, cut and run in every way, answer what the plain model answers, to the bit."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from fuzz.check import Verdict, some_counts, verdict
from fuzz.program import Program, build, report
from fuzz.random_models import random_program
from fuzz.shrink import shrunk
from fuzz.statements import DEFAULT, FEATURES, SWITCHES

NUM_QUICK, NUM_SLOW = 25, 300
MOST_REFUSED = 0.1


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """One thread, and nothing of what the tracer of torch logs (a report would drown in it)."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trace = logging.getLogger("torch.__trace")
    level = trace.level
    trace.setLevel(logging.CRITICAL)
    yield
    trace.setLevel(level)
    torch.set_num_threads(num_threads)


def check_seeds(seeds: range, number: int) -> None:
    """No program is wrong, and few are refused; a wrong one is shown, made small."""
    refused: list[str] = []
    for seed in seeds:
        program = random_program(seed)
        found = verdict(program, some_counts(seed, number))
        if found.kind == "wrong":
            pytest.fail(told(program, found))
        if found.kind == "refused":
            refused.append(f"seed {seed}: {found.reason}")
    assert len(refused) <= MOST_REFUSED * len(seeds) + 2, "\n".join(refused)


def told(program: Program, found: Verdict) -> str:
    stage_counts = (found.num_stages,)

    def still_fails(smaller: Program) -> bool:
        again = verdict(smaller, stage_counts)
        return (again.kind, again.check) == ("wrong", found.check)

    small = shrunk(program, still_fails)
    return f"in {found.num_stages} stages, {found.check}: {found.reason}\n{report(small)}"


@pytest.mark.filterwarnings("ignore")
def test_random_models_answer_as_the_plain_model_does() -> None:
    check_seeds(range(NUM_QUICK), number=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", range(10_000, 10_000 + NUM_SLOW, 50))
def test_more_random_models_answer_as_the_plain_model_does(first: int) -> None:
    check_seeds(range(first, first + 50), number=2)


# --- the generator and the shrinker themselves


def test_a_seed_gives_the_same_program_again() -> None:
    assert [random_program(seed) for seed in range(20)] == [random_program(seed) for seed in range(20)]


def test_every_feature_is_used() -> None:
    programs = [random_program(seed) for seed in range(300)]
    assert {line.feature for p in programs for line in p.lines} == set(FEATURES) & set(DEFAULT)
    assert {line.region > 0 for p in programs for line in p.lines} == {True, False}
    assert {p.calling for p in programs} == {"positional", "keyword", "nested"}
    assert any(i.same_as for p in programs for i in p.inputs)
    assert {p.is_training for p in programs} == {p.is_frozen for p in programs} == {True, False}


@pytest.mark.parametrize("feature", [*FEATURES, *SWITCHES])
def test_a_feature_that_is_turned_off_is_not_used(feature: str) -> None:
    programs = [random_program(seed, set(DEFAULT) - {feature}) for seed in range(30)]
    assert all(line.feature != feature for p in programs for line in p.lines)


def test_a_fault_is_made_small() -> None:
    """As if the fault were any sort: what is left is the sort and what it needs."""

    def has_a_sort(program: Program) -> bool:
        try:
            build(program)
        except SyntaxError:
            return False
        return any(".sort(" in line.code for line in program.lines)

    program = next(p for p in map(random_program, range(1000)) if has_a_sort(p) and len(p.lines) > 10)
    small = shrunk(program, has_a_sort)
    assert [".sort(" in line.code for line in small.lines] == [True]
    assert (len(small.leaves), small.num_frames, small.layouts) == (1, 2, ("contiguous",))
