"""Pairing against a slow twin; infinite speed is the offline metric; a constant delay shifts the labels."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestream.errors import InputError
from sidestream.evals.streaming import (
    Answer,
    Classes,
    ClassLabel,
    Counts,
    FrameTruth,
    counts_of,
    pair,
    pair_same_frames,
    score,
)

RATE = 25.0


def truths_of(labels: list[int], clip: str = "a") -> list[FrameTruth]:
    return [FrameTruth(clip, n, n / RATE, ClassLabel(label)) for n, label in enumerate(labels)]


def answer(frame: int, ready_frames: float, label: int = 0, clip: str = "a") -> Answer:
    return Answer(clip, frame, frame / RATE, frame / RATE, ready_frames / RATE, Classes(((label, 1.0), (99, 0.5))))


def slow_pairs(truths: list[FrameTruth], answers: list[Answer], eta: float) -> list[int | None]:
    """For every truth, look at every answer."""
    used: list[int | None] = []
    for truth in truths:
        best: Answer | None = None
        for a in answers:
            in_time = a.clip == truth.clip and a.ready_seconds <= (truth.frame_index - eta) / RATE + 1e-9
            if in_time and (best is None or (a.ready_seconds, a.frame_index) > (best.ready_seconds, best.frame_index)):
                best = a
        used.append(None if best is None else best.frame_index)
    return used


logs = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(0, 15), st.integers(0, 24)), unique_by=lambda row: row[:2], max_size=40
)


@given(logs, st.sampled_from([-1.0, -0.5, 0.0, 1.0, 2.5]), st.randoms(use_true_random=False))
def test_pairing_is_its_slow_twin(rows, eta, chance: random.Random):
    answers = [answer(frame, frame + delay / 4, clip=clip) for clip, frame, delay in rows]
    truths = truths_of([0] * 16, "a") + truths_of([0] * 16, "b")
    chance.shuffle(answers)
    pairs = pair(truths, answers, eta_frames=eta)
    used = [None if p.answer is None else p.answer.frame_index for p in pairs]
    assert [(p.truth.clip, p.truth.frame_index) for p in pairs] == [(t.clip, t.frame_index) for t in truths]
    expected = slow_pairs(truths, answers, eta)
    assert used == expected
    gaps = [t.frame_index - u for t, u in zip(truths, expected, strict=True) if u is not None]
    assert counts_of(pairs) == Counts(32, gaps.count(0), expected.count(None), sum(gaps))


@pytest.fixture
def labels_and_guesses() -> tuple[list[int], list[int]]:
    chance = random.Random(3)
    return [chance.randrange(3) for _ in range(200)], [chance.randrange(3) for _ in range(200)]


def test_at_infinite_speed_the_streaming_metric_is_the_offline_metric(labels_and_guesses):
    labels, guesses = labels_and_guesses
    answers = [answer(n, n, guess) for n, guess in enumerate(guesses)]
    truths = truths_of(labels)
    found = score(pair(truths, answers))
    assert found == score(pair_same_frames(truths, answers))
    assert found["top_1"] == sum(a == b for a, b in zip(labels, guesses, strict=True)) / 200
    assert (found["in_time"], found["miss"], found["mismatch"]) == (200, 0, 0)


@pytest.mark.parametrize("delay", [1, 4, 17])
def test_at_a_constant_delay_it_is_the_offline_metric_on_shifted_labels(labels_and_guesses, delay):
    labels, guesses = labels_and_guesses
    answers = [answer(n, n + delay, guess) for n, guess in enumerate(guesses)]
    found = score(pair(truths_of(labels), answers))
    shifted = truths_of(labels[delay:])  # frame n carries the label of frame n + delay
    offline = score(pair_same_frames(shifted, answers))
    assert found["top_1"] * 200 == pytest.approx(offline["top_1"] * (200 - delay))
    assert (found["miss"], found["in_time"], found["mismatch"]) == (delay, 0, delay * (200 - delay))
    assert found["mean_mismatch"] == delay


def test_a_tie_counts_as_ready_unless_told_otherwise():
    truths, answers = truths_of([0] * 4), [answer(0, 1), answer(1, 2), answer(2, 3)]
    assert [p.answer and p.answer.frame_index for p in pair(truths, answers)] == [None, 0, 1, 2]
    strict = pair(truths, answers, ties_are_ready=False)
    assert [p.answer and p.answer.frame_index for p in strict] == [None, None, 0, 1]


def test_a_late_answer_to_an_old_frame_is_the_latest_answer():
    """Devices in parallel: what was finished last counts, as in the paper, even where a newer frame was done before."""
    pairs = pair(truths_of([0] * 5), [answer(0, 3.5), answer(2, 3.0)])
    assert [p.answer and p.answer.frame_index for p in pairs] == [None, None, None, 2, 0]


def test_wrong_pairings_say_what_to_give():
    with pytest.raises(InputError, match=r"eta_frames = -1\.5; expected -1 or more"):
        pair(truths_of([0]), [], eta_frames=-1.5)
    with pytest.raises(InputError, match=r"answers to 'b' \(1 clips\), of which there is no truth"):
        pair(truths_of([0]), [answer(0, 0, clip="b")])
    with pytest.raises(InputError, match="has a frame twice"):
        pair(truths_of([0]) * 2, [])
    with pytest.raises(InputError, match="truth of the kinds none"):
        score([])
