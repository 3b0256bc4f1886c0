"""Files that end before their header says so: one warning at the end, and none where the header only seems wrong."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path

import av
import pytest
from video.plain_decode import plain_decode

from sidestream.video import read, stream


def cut(path: Path, share: float, out: Path) -> Path:
    """The first part of a file's bytes."""
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # the index in front: it opens
    out.write_bytes(data[: int(len(data) * share)])
    return out


@pytest.fixture
def fronted(long_clip: Path, tmp_path: Path) -> Path:
    """``long_clip`` with its index in front."""
    return remuxed(long_clip, tmp_path / "whole.mp4", {"movflags": "faststart"})


def remuxed(path: Path, out: Path, options: dict[str, str], shift_frames: int = 0) -> Path:
    """The same packets in another file, so many frames earlier."""
    with av.open(str(path)) as given, av.open(str(out), "w", options=options) as container:
        stream_in = given.streams.video[0]
        stream_out = container.add_stream_from_template(stream_in)
        for packet in given.demux(stream_in):
            if packet.dts is None or packet.pts is None:
                continue
            shift = int(Fraction(shift_frames, 25) / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream_out
            container.mux(packet)
    return out


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.name.startswith("sidestream")]
    caplog.clear()
    return found


def test_a_file_that_is_cut_off_says_so_once_at_its_end(
    fronted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "sidestream")
    short = cut(fronted, 0.6, tmp_path / "short.mp4")
    with av.open(str(short)) as container:
        readable = 0
        try:
            for _ in container.decode(video=0):
                readable += 1
        except av.FFmpegError:
            pass
    assert 100 < readable < 250
    with stream(short) as frames:
        for _ in range(100):
            next(frames)
        assert warnings(caplog) == []  # not before the end
        num_frames = 100 + sum(1 for _ in frames)
    assert 0 <= num_frames - readable <= 4  # the plain loop loses those that the codec still holds
    expected = [f"{short}: the file says 300 frames, {num_frames} could be read; it may be cut off"]
    assert warnings(caplog) == expected
    assert read(short).num_frames == num_frames
    assert warnings(caplog) == expected
    with stream(short, loop=True, max_frames=2 * num_frames + 5) as frames:
        assert sum(1 for _ in frames) == 2 * num_frames + 5
    assert warnings(caplog) == expected  # not again in every round


def test_who_ends_the_stream_himself_is_not_warned(
    fronted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "sidestream")
    short = cut(fronted, 0.6, tmp_path / "short.mp4")
    for path in (fronted, short):
        with stream(path, max_frames=20) as frames:
            assert sum(1 for _ in frames) == 20
        with stream(path) as frames:
            next(frames)
            frames.stop()
            assert next(frames, None) is None
        read(path, max_frames=3)
        read(path, end_seconds=1.0)
        read(path, start_seconds=2.0, end_seconds=3.0)
        read(path, start_seconds=2.0)
    assert warnings(caplog) == []


def test_whole_files_are_read_in_silence(fronted: Path, own_clip: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "sidestream")
    for path in (fronted, own_clip):
        with stream(path, policy="newest") as frames:  # most are dropped
            assert sum(1 for _ in frames) + frames.stats.num_dropped == len(plain_decode(path)[1])
        with stream(path, frame_rate=10) as frames:
            list(frames)
    assert warnings(caplog) == []


def test_frames_that_an_edit_list_leaves_out_are_not_missed(
    long_clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that begins in the middle of a group, as a copying cutter makes it: the count is of all coded frames."""
    caplog.set_level(logging.WARNING, "sidestream")
    edited = remuxed(long_clip, tmp_path / "edited.mp4", {"avoid_negative_ts": "disabled"}, shift_frames=60)
    with av.open(str(edited)) as container:
        assert container.streams.video[0].frames == 300
    with stream(edited) as frames:
        assert sum(1 for _ in frames) < 250
    assert warnings(caplog) == []


def test_a_broken_stretch_in_the_middle_is_no_early_end(
    fronted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "sidestream")
    with av.open(str(fronted)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(fronted.read_bytes())
    for position, size in packets[80:120]:
        data[position : position + size] = bytes(size)
    path = tmp_path / "broken.mp4"
    path.write_bytes(data)
    with stream(path) as frames:
        assert sum(1 for _ in frames) < 290
    assert warnings(caplog) == []


def test_a_header_that_is_off_by_two_frames_is_believed_to_be_meant_well(
    fronted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Cut within the last packets: at most two frames are lost."""
    caplog.set_level(logging.WARNING, "sidestream")
    with av.open(str(fronted)) as container:
        positions = sorted(p.pos for p in container.demux(video=0) if p.size)
    path = tmp_path / "nearly.mp4"
    path.write_bytes(fronted.read_bytes()[: positions[-2]])
    with stream(path) as frames:
        assert 296 <= sum(1 for _ in frames) < 300
    assert warnings(caplog) == []
