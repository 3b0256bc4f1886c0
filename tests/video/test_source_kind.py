"""Which kind a source's name means."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidestream.errors import SourceError
from sidestream.video import source_kind
from sidestream.video.source_kind import camera_device, synthetic_options


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (0, "camera"), (2, "camera"), ("camera", "camera"), ("camera:1", "camera"), ("/dev/video0", "camera"),
        ("rtsp://host/live", "network"), ("http://host/a.mp4", "network"), ("HTTPS://host/a.mp4", "network"),
        ("udp://127.0.0.1:5000", "network"), ("tcp://127.0.0.1:5000?listen", "network"), ("rtp://h:1", "network"),
        ("synthetic", "synthetic"), ("synthetic:seed=3,fps=25", "synthetic"),
        ("clip.mp4", "file"), ("synthetic.mp4", "file"), ("camera.avi", "file"), ("odd:name.mp4", "file"),
        (Path("a") / "b.mkv", "file"), ("missing", "file"),
    ],
)  # fmt: skip
def test_kind(source: object, kind: str) -> None:
    assert source_kind(source) == kind  # type: ignore[arg-type]


def test_a_folder_is_told_by_looking(tmp_path: Path) -> None:
    assert source_kind(tmp_path) == "folder"


@pytest.mark.parametrize("source", [None, 1.5, True, b"clip.mp4"])
def test_nonsense_is_refused(source: object) -> None:
    with pytest.raises(SourceError, match="give a path, an address"):
        source_kind(source)  # type: ignore[arg-type]


def test_camera_device() -> None:
    assert [camera_device(s) for s in (3, "camera", "camera:2", "/dev/video9")] == [
        "/dev/video3", "/dev/video0", "/dev/video2", "/dev/video9"
    ]  # fmt: skip
    with pytest.raises(SourceError, match="camera:NUMBER"):
        camera_device("camera:front")


def test_synthetic_options() -> None:
    assert synthetic_options("synthetic") == {}
    assert synthetic_options("synthetic:seed=3, size=240x320") == {"seed": "3", "size": "240x320"}
    with pytest.raises(SourceError, match=r"'seed' in 'synthetic:seed' is not key=value"):
        synthetic_options("synthetic:seed")
