"""Cameras: a missing one is refused; what is asked of FFmpeg, and the live behaviour, with a file as stand-in."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import av
import pytest

from sidestream.errors import SourceError
from sidestream.video import StreamOptions, stream
from sidestream.video.media_source import opening_of


@pytest.mark.parametrize("source", ["camera:77", "/dev/video77", 77])
def test_a_missing_camera_is_refused(source: str | int) -> None:
    with pytest.raises(SourceError, match="cannot open /dev/video77: "):
        stream(source)


def test_what_ffmpeg_is_asked_for() -> None:
    options = StreamOptions(
        camera_size_px=(480, 640), open_timeout_seconds=3, ffmpeg_options={"pixel_format": "yuyv422"}
    )
    name, opening = opening_of("camera:1", 30.0, options)
    assert (name, opening.format) == ("/dev/video1", "v4l2")
    assert opening.ffmpeg_options == {"video_size": "640x480", "framerate": "30", "pixel_format": "yuyv422"}
    assert opening.timeout_seconds == (3, 10.0)


def test_rtsp_prefers_tcp() -> None:
    assert opening_of("rtsp://h/x", None, StreamOptions())[1].ffmpeg_options == {"rtsp_transport": "tcp"}
    udp = StreamOptions(ffmpeg_options={"rtsp_transport": "udp"})
    assert opening_of("rtsp://h/x", None, udp)[1].ffmpeg_options == {"rtsp_transport": "udp"}


def test_a_listening_rtsp_source_waits_as_long_as_opening_may_take() -> None:
    options = StreamOptions(open_timeout_seconds=2.5, ffmpeg_options={"rtsp_flags": "listen"})
    asked = opening_of("rtsp://h/x", None, options)[1].ffmpeg_options
    assert asked == {"rtsp_flags": "listen", "rtsp_transport": "tcp", "listen_timeout": "3"}


def test_a_camera_is_live(own_clip: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The stand-in ends after 50 frames (unplugged), is back once, and then is gone."""
    real_open, asked = av.open, []

    def fake_open(name: str, **how: Any) -> Any:
        asked.append((name, how["format"], how["options"]))
        if len(asked) in (2, 4, 5):
            raise av.error.FileNotFoundError(2, "No such device", name)
        return real_open(str(own_clip))

    monkeypatch.setattr(av, "open", fake_open)
    with (
        caplog.at_level(logging.WARNING, "sidestream.video"),
        stream("camera:3", policy="lossless", frame_rate=30, first_backoff_seconds=0.01, max_reconnects=2) as frames,
    ):
        assert frames.info.is_live
        assert (frames.info.width, frames.info.height) == (128, 96)
        got = list(frames)
        assert frames.stats.num_reconnects == 1
    assert asked == [("/dev/video3", "v4l2", {"framerate": "30"})] * 5
    assert [f.index for f in got] == list(range(100))
    assert all(b.pts_seconds > a.pts_seconds for a, b in itertools.pairwise(got))
    assert "gone for good" in caplog.text
