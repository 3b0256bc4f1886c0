"""Clips that the video tests make for themselves, once per session."""

from __future__ import annotations

from pathlib import Path

import av
import pytest

from sidestream.video import SyntheticVideo, write


@pytest.fixture(scope="session")
def own_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 frames of 96x128 at 25 a second, with stereo sound, H.264 in MP4."""
    video = SyntheticVideo(seed=5, num_frames=50, size_px=(96, 128))
    return write(tmp_path_factory.mktemp("own") / "own.mp4", video.clip(with_sound=True))


@pytest.fixture(scope="session")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 frames of 64x80 with a key frame every 40 and B-frames between them."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    video = SyntheticVideo(seed=6, num_frames=300, size_px=(64, 80))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "40", "bf": "3", "b-adapt": "0"})
        stream.width, stream.height, stream.pix_fmt = 80, 64, "yuv420p"
        for frame in video:
            picture = av.VideoFrame.from_ndarray(frame.rgb_HWC.numpy(), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path
