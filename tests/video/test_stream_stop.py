"""``Stream.stop``, ``close`` and ``catch_up`` while another thread, or the interrupted one, is inside the stream."""

from __future__ import annotations

import logging
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
from video.fake_source import BusySource, FakeSource, blank, wait_until

from sidestream.clock import WALL, Clock, ManualClock
from sidestream.errors import SourceError
from sidestream.types import Frame
from sidestream.video import Stream, stream
from sidestream.video.policy import parse_policy


def stream_of(source: FakeSource, policy: str, *, real_time: bool = False, clock: Clock = WALL) -> Stream:
    return Stream(source, parse_policy(policy), real_time=real_time, clock=clock, max_frames=None)


class Reader(threading.Thread):
    """Takes frames in a thread of its own; ``got`` holds them and ``error`` what ended it."""

    def __init__(self, frames: Stream) -> None:
        super().__init__(daemon=True)
        self.frames, self.got = frames, list[Frame]()
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            for frame in self.frames:
                self.got.append(frame)
        except BaseException as error:
            self.error = error

    def ends_within(self, seconds: float) -> bool:
        self.join(seconds)
        return not self.is_alive()


def readers_alive() -> int:
    return sum(thread.name == "sidestream-reader" for thread in threading.enumerate())


@pytest.mark.parametrize("last", [blank(1), None, SourceError("gone")], ids=["frame", "end", "error"])
def test_close_leaves_a_source_that_blocks_to_the_thread_inside(last: Frame | Exception | None) -> None:
    source = FakeSource()
    frames = stream_of(source, "lossless")
    reader = Reader(frames)
    source.hand(blank(0))
    wait_until(lambda: source.num_asked == 2)
    started = time.monotonic()
    frames.close()
    frames.close()
    assert time.monotonic() - started < 0.5
    assert source.is_stopped
    assert source.num_closes == 0
    source.hand(last)
    assert reader.ends_within(5)
    assert [frame.index for frame in reader.got] == [0]
    assert reader.error is (last if isinstance(last, Exception) else None)
    assert (source.num_closes, source.was_closed_while_inside) == (1, False)
    assert list(frames) == []
    frames.close()
    assert source.num_closes == 1


def test_close_at_any_moment_closes_once_and_never_inside() -> None:
    rng = random.Random(0)
    for number in range(150):
        source = BusySource(lambda: time.sleep(1e-5))
        frames = stream_of(source, ("lossless", "newest")[number % 2])
        readers = [Reader(frames), Reader(frames)]
        time.sleep(rng.random() * 0.002)
        frames.close()
        assert all(reader.ends_within(5) and reader.error is None for reader in readers)
        assert not source.was_closed_while_inside
        frames.close()
        assert source.num_closes == 1


@pytest.mark.parametrize("ask", ["stop", "close"])
def test_asked_from_inside_the_pull_nothing_locks_up(ask: str) -> None:
    """As from a signal handler that interrupts the thread while it is inside the source and holds the lock."""

    def work() -> None:
        if source.num_asked == 3:
            getattr(frames, ask)()

    source = BusySource(work)
    frames = stream_of(source, "lossless")
    reader = Reader(frames)
    assert reader.ends_within(5)
    assert [frame.index for frame in reader.got] == [0, 1, 2]
    assert (source.num_closes, source.was_closed_while_inside) == (1, False)


def test_stop_takes_no_lock() -> None:
    """A signal handler may interrupt the thread at any place, so whatever lock there is may be held."""
    source = FakeSource()
    frames = stream_of(source, "newest")
    assert frames._mailbox is not None
    with frames._working, frames._mailbox._changed:
        stopping = threading.Thread(target=frames.stop, daemon=True)
        stopping.start()
        stopping.join(5)
        assert not stopping.is_alive()
    source.hand(None)


@pytest.fixture
def alarm() -> Iterator[Any]:
    """Calls a function in a signal handler of this thread, after so many seconds."""

    def set_alarm(seconds: float, call: Any) -> None:
        signal.signal(signal.SIGALRM, lambda *_: call())
        signal.setitimer(signal.ITIMER_REAL, seconds)

    before = signal.getsignal(signal.SIGALRM)
    yield set_alarm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.timeout(60, method="thread")
def test_stop_from_a_signal_handler_ends_a_wait(alarm: Any) -> None:
    source = FakeSource()
    frames = stream_of(source, "newest")
    started = time.monotonic()
    alarm(0.2, frames.stop)
    assert next(frames, None) is None
    assert 0.2 <= time.monotonic() - started < 0.7
    source.hand(None)


@pytest.mark.parametrize("policy", ["newest", "bounded:4"])
def test_stop_ends_a_wait_for_a_silent_source(policy: str) -> None:
    source = FakeSource()
    frames = stream_of(source, policy)
    source.hand(blank(0))
    reader = Reader(frames)
    wait_until(lambda: reader.got)
    frames.stop()
    assert reader.ends_within(0.5)
    assert reader.error is None
    assert source.num_closes == 0  # the thread inside does that, when the source lets it go
    source.hand(None)
    wait_until(lambda: source.num_closes)
    assert (source.num_closes, source.was_closed_while_inside) == (1, False)


def test_a_stopped_stream_gives_no_more_waiting_frames() -> None:
    source = FakeSource()
    frames = stream_of(source, "bounded:3")
    source.hand(*map(blank, range(4)))
    wait_until(lambda: source.num_asked == 5)
    frames.stop()
    assert list(frames) == []
    assert (frames.stats.num_frames, frames.stats.num_dropped) == (0, 1)
    source.hand(None)


@pytest.mark.parametrize("policy", ["lossless", "newest"])
def test_stop_ends_the_wait_for_a_frame_that_is_due_late(policy: str) -> None:
    source = FakeSource(is_live=False)
    frames = stream_of(source, policy, real_time=True)
    source.hand(blank(0), blank(1, pts_seconds=60.0))
    num_before = readers_alive()
    reader = Reader(frames)
    wait_until(lambda: reader.got and source.num_asked == 2)
    frames.stop()
    assert reader.ends_within(0.5)
    started = time.monotonic()
    frames.close()
    assert time.monotonic() - started < 0.5
    assert readers_alive() <= num_before
    assert [frame.index for frame in reader.got] == [0]
    assert (source.num_closes, source.was_closed_while_inside) == (1, False)


@pytest.fixture
def unplugged(own_clip: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    """Opens a camera that ends after 50 frames and is waited for 8 s; returns when it is waited for."""
    real_open, asked = av.open, []

    def fake_open(name: str, **_: Any) -> Any:
        asked.append(name)
        if len(asked) > 1:
            raise av.error.FileNotFoundError(2, "No such device", name)
        return real_open(str(own_clip))

    def open_camera(policy: str) -> Stream:
        caplog.set_level(logging.WARNING, "sidestream.video")
        return stream("camera:3", policy=policy, first_backoff_seconds=8)

    monkeypatch.setattr(av, "open", fake_open)
    return open_camera


@pytest.mark.parametrize("policy", ["lossless", "newest"])
@pytest.mark.parametrize("ask", ["stop", "close"])
def test_stop_ends_the_wait_before_a_reconnect(
    unplugged: Any, caplog: pytest.LogCaptureFixture, policy: str, ask: str
) -> None:
    num_before = readers_alive()
    frames = unplugged(policy)
    reader = Reader(frames)
    wait_until(lambda: "attempt 1 of 5 to reconnect in 8.0 s" in caplog.text, 20)
    getattr(frames, ask)()
    assert reader.ends_within(0.5)
    frames.close()
    assert readers_alive() <= num_before


@pytest.mark.timeout(60, method="thread")
def test_stop_from_a_signal_handler_ends_the_wait_before_a_reconnect(unplugged: Any, alarm: Any) -> None:
    frames = unplugged("lossless")
    assert sum(1 for _ in zip(range(50), frames)) == 50
    started = time.monotonic()
    alarm(0.2, frames.stop)
    assert next(frames, None) is None
    assert 0.2 <= time.monotonic() - started < 0.7


def test_who_wants_latency(own_clip: Path) -> None:
    assert not stream(own_clip).wants_latency
    assert not stream(own_clip, policy="newest").wants_latency
    assert not stream("synthetic").wants_latency
    assert stream(own_clip, real_time=True).wants_latency
    assert stream(own_clip, real_time=True, policy="lossless").wants_latency
    assert stream_of(FakeSource(), "lossless").wants_latency


@pytest.mark.parametrize(("policy", "num_dropped", "then"), [("newest", 9, [11]), ("bounded:3", 7, [10, 11])])
def test_catch_up_forgets_what_a_live_source_sent_before(policy: str, num_dropped: int, then: list[int]) -> None:
    source = FakeSource()
    frames = stream_of(source, policy)
    source.hand(*map(blank, range(10)))
    wait_until(lambda: source.num_asked == 11)
    assert frames.stats.num_dropped == num_dropped
    frames.catch_up()
    assert frames.stats.num_dropped == 0
    before = WALL.now()
    source.hand(blank(10), blank(11))
    wait_until(lambda: source.num_asked == 13)
    got = [next(frames) for _ in then]
    assert [frame.index for frame in got] == then
    assert all(frame.arrived_at_seconds is not None and frame.arrived_at_seconds >= before for frame in got)
    assert (frames.stats.num_frames, frames.stats.num_dropped) == (len(then), 2 - len(then))
    source.hand(None)
    assert list(frames) == []


@pytest.mark.parametrize("options", [{}, {"policy": "bounded:60"}, {"real_time": True, "clock": ManualClock()}])
def test_catch_up_before_the_first_frame_of_a_file_loses_nothing(own_clip: Path, options: dict[str, Any]) -> None:
    with stream(own_clip, **options) as frames:
        frames.catch_up()
        if "clock" in options:
            options["clock"].advance(3.0)
            frames.catch_up()
        assert [frame.index for frame in frames] == list(range(50))
        assert frames.stats.num_dropped == 0


def test_catch_up_in_a_simulated_replay_skips_what_was_due(own_clip: Path) -> None:
    clock = ManualClock(5.0)
    with stream(own_clip, real_time=True, policy="bounded:4", clock=clock) as frames:
        assert next(frames).index == 0
        clock.advance(0.5)  # 1..12 are due
        frames.catch_up()
        assert next(frames).index == 13
        assert clock.now() == pytest.approx(5.52)
        assert frames.stats.num_dropped == 0
        clock.advance(0.4)  # 14..23 are due, the newest four wait
        assert next(frames).index == 20
        assert frames.stats.num_dropped == 6
