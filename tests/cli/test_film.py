"""The annotated video of a run: every frame once, in order, each with the newest answer up to it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sidestream.cli.film import Film, Watched


def frame(index: int) -> Any:
    return SimpleNamespace(index=index)


def answer(index: int) -> Any:
    return SimpleNamespace(frame_index=index, frame=frame(index))


def shown_by(calls: list[tuple[str, int]]) -> list[tuple[int, int | None]]:
    shown: list[tuple[int, int | None]] = []
    film = Film(lambda f, output: shown.append((f.index, None if output is None else output.frame_index)))
    for kind, index in calls:
        film.see(frame(index)) if kind == "frame" else film.add(answer(index))
    film.finish()
    return shown


def test_an_answer_for_every_frame() -> None:
    calls = [("frame", 0), ("frame", 1), ("answer", 0), ("frame", 2), ("answer", 1), ("answer", 2)]
    assert shown_by(calls) == [(0, 0), (1, 1), (2, 2)]


def test_frames_between_answers_carry_the_one_before() -> None:
    calls = [("frame", n) for n in range(5)] + [("answer", 1), ("frame", 5), ("answer", 4), ("frame", 6)]
    assert shown_by(calls) == [(0, None), (1, 1), (2, 1), (3, 1), (4, 4), (5, 4), (6, 4)]


def test_a_stream_that_is_not_watched_shows_what_was_answered() -> None:
    assert shown_by([("answer", 0), ("answer", 3)]) == [(0, 0), (3, 3)]


def test_frames_that_a_live_source_dropped_are_not_invented() -> None:
    calls = [("frame", 0), ("frame", 4), ("answer", 0), ("answer", 4), ("frame", 9)]
    assert shown_by(calls) == [(0, 0), (4, 4), (9, 4)]


def test_watched_stays_the_stream_it_is() -> None:
    class Stream:
        info = "the stream's own"

        def __iter__(self) -> Any:
            return iter([frame(0), frame(1)])

    seen: list[int] = []
    watched = Watched(Stream(), lambda f: seen.append(f.index))
    assert [f.index for f in watched] == seen == [0, 1]
    assert watched.info == "the stream's own"
