"""Network sources against real senders over loopback: TCP with a drop-out, UDP, RTSP, HTTP, and silent servers."""

from __future__ import annotations

import contextlib
import functools
import http.server
import itertools
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from video.plain_decode import plain_decode

from sidestream.errors import SourceError
from sidestream.video import Stream, SyntheticVideo, stream, write
from sidestream.video.media_source import backoff_seconds

SENDER = Path(__file__).with_name("net_sender.py")


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def sender() -> Iterator[Any]:
    """Starts senders, and ends them with the test."""
    running = []

    def start(*arguments: object) -> subprocess.Popen[bytes]:
        running.append(subprocess.Popen([sys.executable, str(SENDER), *map(str, arguments)], stderr=subprocess.DEVNULL))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


def reach(address: str, **options: Any) -> Stream:
    """The stream, as soon as its sender is there."""
    until = time.monotonic() + 30
    while True:
        try:
            return stream(address, **options)
        except SourceError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


@pytest.mark.timeout(120)
def test_tcp_sender_drops_out_and_comes_back(sender: Any, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    sender(f"tcp://127.0.0.1:{port}?listen", 50, "60:40", "60:200")
    options = {"first_backoff_seconds": 0.1, "max_reconnects": 4, "open_timeout_seconds": 5}
    caplog.set_level(logging.WARNING, "sidestream.video")
    with reach(f"tcp://127.0.0.1:{port}", policy="bounded:500", **options) as frames:
        assert frames.info.is_live
        assert frames.info.duration_seconds is None
        got = list(frames)
        stats = frames.stats
    greys = [float(f.rgb_HWC.float().mean()) for f in got]
    first = sum(abs(grey - 40) < 6 for grey in greys)
    second = sum(abs(grey - 200) < 6 for grey in greys)
    assert first >= 50
    assert second >= 50
    assert first + second == len(got)
    assert greys == sorted(greys, key=lambda grey: grey > 120)
    assert [f.index for f in got] == list(range(len(got)))
    times = [f.pts_seconds for f in got]
    assert all(later > earlier for earlier, later in itertools.pairwise(times))
    assert times[first] - times[first - 1] >= 0.1  # the gap is on the time axis
    assert stats.num_reconnects == 1
    assert "dropped out" in caplog.text
    assert "is back" in caplog.text
    assert "gone for good after 4 attempts" in caplog.text
    arrivals = [f.arrived_at_seconds for f in got if f.arrived_at_seconds is not None]
    assert len(arrivals) == len(got)
    assert arrivals == sorted(arrivals)


@pytest.mark.timeout(120)
def test_newest_is_the_default_of_a_live_source(sender: Any) -> None:
    port = free_port()
    sender(f"tcp://127.0.0.1:{port}?listen", 50, "100:90")
    with reach(f"tcp://127.0.0.1:{port}", max_reconnects=0) as frames:
        assert frames.policy.name == "newest"
        indices = []
        for frame in frames:
            indices.append(frame.index)
            time.sleep(0.15)
        stats = frames.stats
    assert stats.num_dropped > len(indices)
    assert indices[-1] - indices[0] + 1 - len(indices) + indices[0] == stats.num_dropped


@pytest.mark.timeout(60)
def test_udp(sender: Any) -> None:
    port = free_port(socket.SOCK_DGRAM)
    sender(f"udp://127.0.0.1:{port}?pkt_size=1316", 50, "400:120")
    options = {"max_reconnects": 0, "read_timeout_seconds": 2, "open_timeout_seconds": 20}
    with stream(f"udp://127.0.0.1:{port}", policy="lossless", max_frames=40, **options) as frames:
        got = list(frames)
    assert len(got) == 40
    assert np.mean([float(f.rgb_HWC.float().mean()) for f in got]) == pytest.approx(120, abs=6)


@pytest.mark.timeout(60)
def test_rtsp(sender: Any) -> None:
    """The stream listens, as a server for one sender does; the sender announces itself and sends over TCP."""
    address = f"rtsp://127.0.0.1:{free_port()}/live"
    sender(address, 50, "60:40")
    options: dict[str, Any] = {"max_reconnects": 0, "open_timeout_seconds": 25, "read_timeout_seconds": 5}
    with stream(address, policy="lossless", ffmpeg_options={"rtsp_flags": "listen"}, **options) as frames:
        assert frames.info.is_live
        assert (frames.info.height, frames.info.width) == (48, 64)
        got = list(frames)
    assert 50 <= len(got) <= 60
    assert [f.index for f in got] == list(range(len(got)))
    assert [float(f.rgb_HWC.float().mean()) for f in got] == pytest.approx([40] * len(got), abs=6)
    steps = np.diff([f.pts_seconds for f in got])
    assert steps == pytest.approx([0.02] * len(steps), abs=0.001)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server(own_clip: Path) -> Iterator[str]:
    """An address whose files are those beside our own clip."""
    handler = functools.partial(Quiet, directory=str(own_clip.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.mark.timeout(60)
def test_a_file_over_http_is_a_file(server: str, own_clip: Path) -> None:
    rgb, _ = plain_decode(own_clip)
    with stream(f"{server}/{own_clip.name}") as frames:
        assert not frames.info.is_live
        got = list(frames)
    assert np.array_equal(np.stack([f.rgb_HWC.numpy() for f in got]), rgb)


class Cutting(http.server.BaseHTTPRequestHandler):
    """Breaks off in the middle of the file the first ``num_cuts`` times."""

    data = b""
    num_cuts = 1

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.data)))
        self.end_headers()
        type(self).num_cuts -= 1
        with contextlib.suppress(OSError):
            self.wfile.write(self.data[: len(self.data) // 2] if self.num_cuts >= 0 else self.data)
        self.close_connection = True


@pytest.mark.timeout(60)
@pytest.mark.parametrize("num_cuts", [1, 1000])
def test_a_file_over_http_that_breaks_off_is_taken_up_again(tmp_path: Path, num_cuts: int) -> None:
    """Cut once, all frames come, once each; always cut at the same place, the stream ends there."""
    path = write(tmp_path / "a.mp4", SyntheticVideo(seed=6, num_frames=300, size_px=(64, 80)))
    rgb, times = plain_decode(path)
    handler = type("Handler", (Cutting,), {"data": path.read_bytes(), "num_cuts": num_cuts})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{running.server_address[1]}/a.mp4"
        with stream(address, first_backoff_seconds=0.05, max_reconnects=3) as frames:
            got = list(frames)
            stats = frames.stats
        running.shutdown()
    assert stats.num_reconnects >= 1
    assert [f.index for f in got] == list(range(len(got)))
    assert np.array_equal(np.stack([f.rgb_HWC.numpy() for f in got]), rgb[: len(got)])
    assert [f.pts_seconds for f in got] == pytest.approx(times[: len(got)])
    assert len(got) == 300 if num_cuts == 1 else 60 < len(got) < 240


@pytest.mark.timeout(60)
def test_what_is_not_there_is_refused(server: str) -> None:
    with pytest.raises(SourceError, match=r"missing\.mp4"):
        stream(f"{server}/missing.mp4")
    with pytest.raises(SourceError, match=r"cannot open tcp://127\.0\.0\.1"):
        stream(f"tcp://127.0.0.1:{free_port()}")
    listen = {"rtsp_flags": "listen"}
    started = time.monotonic()
    with pytest.raises(SourceError, match=r"cannot open rtsp://127\.0\.0\.1"):
        stream(f"rtsp://127.0.0.1:{free_port()}/live", open_timeout_seconds=1, ffmpeg_options=listen)
    assert time.monotonic() - started < 6
    with pytest.raises(SourceError, match=r"cannot open rtsp://127\.0\.0\.1"):
        stream(f"rtsp://127.0.0.1:{free_port()}/live", open_timeout_seconds=3)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("scheme", ["tcp", "http", "rtsp"])
def test_a_silent_server_does_not_hang_us(scheme: str) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        with pytest.raises(SourceError, match=r"no answer in time|sent nothing in time"):
            stream(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}/a", open_timeout_seconds=1, read_timeout_seconds=1)
        assert time.monotonic() - started < 6


@pytest.mark.timeout(60)
def test_close_does_not_wait_for_a_silent_network(sender: Any) -> None:
    port = free_port()
    process = sender(f"tcp://127.0.0.1:{port}?listen", 50, "2000:90")
    frames = reach(f"tcp://127.0.0.1:{port}", read_timeout_seconds=4)
    next(frames)
    process.send_signal(signal.SIGSTOP)  # connected, but silent
    time.sleep(0.5)
    started = time.monotonic()
    frames.close()
    assert time.monotonic() - started < 3
    process.send_signal(signal.SIGCONT)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("ask", ["stop", "close"])
def test_a_pull_from_a_silent_network_ends_at_the_read_timeout(sender: Any, ask: str) -> None:
    port = free_port()
    process = sender(f"tcp://127.0.0.1:{port}?listen", 50, "2000:90")
    frames = reach(f"tcp://127.0.0.1:{port}", policy="lossless", read_timeout_seconds=2)
    next(frames)
    process.send_signal(signal.SIGSTOP)
    indices: list[int] = []
    reader = threading.Thread(target=lambda: indices.extend(frame.index for frame in frames))
    reader.start()
    time.sleep(0.7)  # what was under way has been read
    started = time.monotonic()
    getattr(frames, ask)()
    assert time.monotonic() - started < 0.5
    reader.join(6)
    assert 0.5 < time.monotonic() - started < 4
    assert not reader.is_alive()
    assert list(frames) == []


def test_backoff_doubles_up_to_eight_seconds() -> None:
    assert [backoff_seconds(attempt) for attempt in range(7)] == [0.5, 1, 2, 4, 8, 8, 8]
