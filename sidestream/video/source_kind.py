"""What kind of source a name means: file, folder of images, camera, network stream or the synthetic source."""

from __future__ import annotations

import os
from pathlib import Path

from sidestream.errors import SourceError

KINDS = ("file", "folder", "camera", "network", "synthetic")
NETWORK_SCHEMES = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp", "rtp", "srt")

Source = str | int | os.PathLike[str]


def source_kind(source: Source) -> str:
    """One of ``KINDS``, from the name alone, except that a folder is told from a file by looking.

    ``0``, ``"camera"``, ``"camera:1"`` and ``"/dev/video1"`` are cameras; ``"rtsp://..."`` and other addresses are
    network streams; ``"synthetic"`` and ``"synthetic:seed=3,fps=25"`` make their own frames; anything else is a path.

    Raises:
        SourceError: ``source`` is not a name, a path or a camera number.
    """
    if isinstance(source, bool) or not isinstance(source, (str, int, os.PathLike)):
        raise SourceError(f"source is {source!r}; give a path, an address, 'camera:0', 'synthetic' or a camera number")
    name = str(source)
    if isinstance(source, int) or name == "camera" or name.startswith(("camera:", "/dev/video")):
        return "camera"
    if name == "synthetic" or name.startswith("synthetic:"):
        return "synthetic"
    if "://" in name and name.split("://", 1)[0].lower() in NETWORK_SCHEMES:
        return "network"
    return "folder" if Path(name).is_dir() else "file"


def camera_device(source: Source) -> str:
    """The V4L2 device a camera source means: 1, "camera:1" and "/dev/video1" are all ``/dev/video1``."""
    name = str(source)
    if name.startswith("/dev/"):
        return name
    number = name.removeprefix("camera").removeprefix(":") or "0"
    if not number.isdigit():
        raise SourceError(f"camera {name!r} is not known; use 'camera:NUMBER', for example 'camera:0'")
    return f"/dev/video{number}"


def synthetic_options(source: Source) -> dict[str, str]:
    """The ``key=value`` pairs behind ``"synthetic:"``, still as text."""
    text = str(source).removeprefix("synthetic").removeprefix(":")
    pairs = [part for part in text.split(",") if part.strip()]
    for part in pairs:
        if "=" not in part:
            raise SourceError(
                f"{part!r} in {str(source)!r} is not key=value; write for example 'synthetic:seed=3,fps=25'"
            )
    return {key.strip(): value.strip() for key, value in (part.split("=", 1) for part in pairs)}
