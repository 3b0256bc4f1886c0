"""``frame_at`` equals looking the time up in a full decode, for random times, B-frames and odd files included."""

from __future__ import annotations

import bisect
import random
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from video.plain_decode import plain_decode

from sidestream.errors import InputError, SourceError
from sidestream.video import SyntheticVideo, frame_at, read


def check_random_times(path: Path, rgb: np.ndarray, times: list[float], num_times: int) -> None:
    rng = random.Random(7)
    exact = [times[rng.randrange(len(times))] for _ in range(num_times // 3)]
    for seconds in exact + [rng.uniform(0, times[-1] + 0.5) for _ in range(num_times - len(exact))]:
        shown = bisect.bisect_right(times, seconds) - 1
        frame = frame_at(path, seconds)
        assert frame.index == shown
        assert frame.pts_seconds == pytest.approx(times[shown], abs=1e-9)
        assert np.array_equal(frame.rgb_HWC.numpy(), rgb[shown]), f"wrong pixels at {seconds} s"


def test_random_times_of_our_own_clip_with_b_frames(long_clip: Path) -> None:
    rgb, _ = plain_decode(long_clip)
    check_random_times(long_clip, rgb, list(read(long_clip).pts_seconds), 60)


NAMES = ["unordered.mov", "nasa_13013.mp4", "flipping_a_pancake.mkv", "video_90.mov", "v_BaseballPitch_g01_c01.avi"]


@pytest.mark.parametrize("name", [*NAMES, "v_ApplyEyeMakeup_g01_c01.avi", "shots_212s.mp4"])
def test_random_times_of_real_clips(data_dir: Path, name: str) -> None:
    clip = read(data_dir / "clips" / name)
    num_times = 12 if name.startswith("shots") else 20
    check_random_times(data_dir / "clips" / name, clip.rgb_THWC.numpy(), list(clip.pts_seconds), num_times)


def test_before_the_start_and_after_the_end(own_clip: Path) -> None:
    assert frame_at(own_clip, 1e6).index == 49
    assert torch.equal(frame_at(own_clip, 0.0).rgb_HWC, read(own_clip).rgb_THWC[0])
    with pytest.raises(InputError, match="before the first frame"):
        frame_at(own_clip, -0.1)
    with pytest.raises(SourceError, match="only files can be addressed by time"):
        frame_at("synthetic:seed=1", 0.1)


def test_open_gop_leading_pictures_are_not_taken_from_a_cold_start(tmp_path: Path) -> None:
    """With open groups the B-frames before a key frame lean on the group before it."""
    path = tmp_path / "open.mp4"
    with av.open(str(path), "w") as container:
        options = {"g": "12", "bf": "3", "b-adapt": "0", "x264-params": "open-gop=1:keyint=12:scenecut=0"}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 80, 64, "yuv420p"
        for frame in SyntheticVideo(seed=8, num_frames=80, size_px=(64, 80), speed=4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.rgb_HWC.numpy(), format="rgb24")))
        container.mux(stream.encode(None))
    rgb, times = plain_decode(path)
    for index in range(80):
        frame = frame_at(path, times[index] + 0.001)
        assert frame.index == index
        assert np.array_equal(frame.rgb_HWC.numpy(), rgb[index]), f"wrong pixels at frame {index}"


FORMATS = [
    ("a.avi", "libx264", {"g": "30", "bf": "3"}),
    ("b.avi", "mpeg4", {"g": "12", "bf": "2"}),
    ("c.ts", "libx264", {"g": "30", "bf": "3"}),
    ("d.h264", "libx264", {"g": "30", "bf": "3"}),
    ("e.flv", "libx264", {"g": "30", "bf": "3"}),
    ("f.mpg", "mpeg2video", {"g": "12", "bf": "2"}),
    ("g.webm", "libvpx-vp9", {"cpu-used": "8", "deadline": "realtime"}),
    ("h.mjpeg", "mjpeg", {}),
    ("i.mkv", "libx264", {"x264-params": "intra-refresh=1"}),
]


@pytest.mark.parametrize(("name", "codec", "options"), FORMATS, ids=[each[0] for each in FORMATS])
def test_containers_and_codecs(tmp_path: Path, name: str, codec: str, options: dict[str, str]) -> None:
    """Every container: all frames, at a steady rate, and the right one at any time, whether it can seek or not."""
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = 80, 64
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for frame in SyntheticVideo(seed=6, num_frames=100, size_px=(64, 80)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.rgb_HWC.numpy(), format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        rgb = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    clip = read(path)
    assert np.array_equal(clip.rgb_THWC.numpy(), rgb)
    tick = 0.0011 if name.endswith((".flv", ".webm", ".mkv")) else 1e-6  # these count milliseconds
    assert clip.pts_seconds == pytest.approx([number / 25 for number in range(100)], abs=tick)
    check_random_times(path, rgb, list(clip.pts_seconds), 12)
