"""Sources that cannot be used: one clear line that names them, soon, and no other exception."""

from __future__ import annotations

import time
from pathlib import Path

import av
import numpy as np
import pytest

from sidestream.errors import SourceError
from sidestream.video import frame_at, read, stream


def only_sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        track = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(track.encode(frame))
        container.mux(track.encode(None))


def without_index(path: Path, own_clip: Path) -> None:
    """An ordinary MP4 (index at the end), cut at half."""
    plain = path.with_name("plain.mp4")
    with av.open(str(own_clip)) as given, av.open(str(plain), "w") as container:
        stream_in = given.streams.video[0]
        stream_out = container.add_stream_from_template(stream_in)
        for packet in given.demux(stream_in):
            if packet.dts is not None:
                packet.stream = stream_out
                container.mux(packet)
    data = plain.read_bytes()
    assert data.index(b"moov") > data.index(b"mdat")
    path.write_bytes(data[: len(data) // 2])


@pytest.fixture
def wrong(tmp_path: Path, own_clip: Path) -> dict[str, Path]:
    """One path per way of being wrong."""
    paths = {name: tmp_path / f"{name}.mp4" for name in ("missing", "text", "empty", "noise", "sound", "cut", "header")}
    paths["folder"] = tmp_path / "folder"
    paths["folder"].mkdir()
    (paths["folder"] / "readme.txt").write_text("no image here")
    paths["text"].write_text("this is no video\n" * 100)
    paths["empty"].write_bytes(b"")
    paths["noise"].write_bytes(np.random.default_rng(0).bytes(20_000))
    only_sound(paths["sound"])
    without_index(paths["cut"], own_clip)
    data = own_clip.read_bytes()  # faststart: the index comes first, so this one opens but has no picture data
    paths["header"].write_bytes(data[: data.index(b"mdat") + 4])
    return paths


EXPECTED = {
    "missing": "No such file",
    "text": "not a video, or it is cut short or damaged",
    "empty": r"is empty \(0 bytes\)",
    "noise": "not a video, or it is cut short or damaged",
    "sound": "has no video stream",
    "cut": "not a video, or it is cut short or damaged",
    "header": "no frame that can be decoded|cut short or damaged",
    "folder": "holds no image",
}


@pytest.mark.parametrize("how", EXPECTED)
def test_one_clear_line_that_names_the_file(wrong: dict[str, Path], how: str) -> None:
    for use in (stream, read):
        started = time.monotonic()
        with pytest.raises(SourceError, match=EXPECTED[how]) as caught:
            use(wrong[how])
        assert str(wrong[how]) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert time.monotonic() - started < 5
    with pytest.raises(SourceError):
        frame_at(wrong[how], 1.0)


def test_a_folder_of_damaged_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    with pytest.raises(SourceError, match=r"no image in .* can be read"):
        stream(tmp_path)


def test_a_damaged_stretch_is_skipped_counted_and_the_rest_is_read(long_clip: Path, tmp_path: Path) -> None:
    """A key frame and what leans on it, overwritten with zeros: that packet is counted, the other groups come."""
    with av.open(str(long_clip)) as container:
        packets = [(p.pos, p.size, p.is_keyframe) for p in container.demux(video=0) if p.size]
    position, size, _ = [packet for packet in packets if packet[2]][3]
    data = bytearray(long_clip.read_bytes())
    data[position : position + size] = bytes(size)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    with stream(path) as frames:
        got = list(frames)
        assert frames.stats.num_corrupt_packets >= 1
    whole = read(long_clip)
    same = [f for f in got if f.pts_seconds < 4.7 or f.pts_seconds > 6.5]
    assert len(same) > 240
    times = {round(seconds, 6): number for number, seconds in enumerate(whole.pts_seconds)}
    for frame in same:
        assert np.array_equal(frame.rgb_HWC, whole.rgb_THWC[times[round(frame.pts_seconds, 6)]])
