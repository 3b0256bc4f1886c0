"""What every kind of source offers to ``Stream``, its options, and the two kinds that need no FFmpeg input."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sidestream.errors import InputError, SourceError
from sidestream.types import Frame
from sidestream.video.source_kind import Source, synthetic_options

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
FOLDER_FRAME_RATE = 25.0


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """What is known of a stream when it opens."""

    source: str
    width: int
    """Pixels, after rotation."""
    height: int
    frame_rate: float | None
    is_live: bool
    duration_seconds: float | None


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """Less common options of ``stream``; each is a keyword argument of it."""

    open_timeout_seconds: float = 10.0
    read_timeout_seconds: float = 10.0
    """A live source that sends nothing for so long has dropped out."""
    max_reconnects: int = 5
    """Attempts in a row to reach a live source that dropped out, before the stream ends."""
    first_backoff_seconds: float = 0.5
    """Wait before the first of them; doubles up to 8 s."""
    decode_threads: int = 1
    camera_size_px: tuple[int, int] | None = None
    """(height, width) to ask of a camera."""
    ffmpeg_options: Mapping[str, str] = field(default_factory=dict)
    """Passed to FFmpeg when it opens the source."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> StreamOptions:
        """Raises InputError for an option that does not exist."""
        known = [each.name for each in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                raise InputError(f"stream has no option {name!r}; it knows {', '.join(known)}")
        return cls(**options)


class FrameSource(Protocol):
    """A source that is open. ``frames`` runs once; ``close`` is called by whoever runs it, when it is done."""

    info: StreamInfo
    num_reconnects: int

    @property
    def num_corrupt_packets(self) -> int: ...

    def frames(self) -> Iterator[Frame]: ...

    def stop(self) -> None:
        """Ask ``frames`` to end soon: from any thread or a signal handler, so set a plain flag and take no lock."""

    def close(self) -> None: ...


class FolderSource:
    """The images of a folder in natural order (2 before 10), at a constant frame rate."""

    def __init__(self, source: Source, frame_rate: float | None, loop: bool) -> None:
        self.num_corrupt_packets, self.num_reconnects = 0, 0
        self._paths = image_paths(source)
        self._rate, self._loop, self._stopped = frame_rate or FOLDER_FRAME_RATE, loop, False
        first = next(iter(self._pictures()), None)
        self.num_corrupt_packets = 0
        if first is None:
            raise SourceError(f"no image in {source} can be read; check that the files are whole")
        height, width = first.shape[:2]
        duration = len(self._paths) / self._rate
        self.info = StreamInfo(str(source), width, height, self._rate, False, None if loop else duration)

    def frames(self) -> Iterator[Frame]:
        index = 0
        while True:
            for rgb in self._pictures():
                yield Frame(rgb, index, index / self._rate)
                index += 1
                if self._stopped:
                    return
            if not self._loop:
                return

    def stop(self) -> None:
        self._stopped = True

    def close(self) -> None:
        pass

    def _pictures(self) -> Iterator[Tensor]:
        for path in self._paths:
            rgb = _read_image(path)
            if rgb is None:
                self.num_corrupt_packets += 1
            else:
                yield rgb


class SyntheticSource:
    """Frames of ``SyntheticVideo``, with their truth."""

    def __init__(self, source: Source, frame_rate: float | None, loop: bool) -> None:
        from sidestream.video.synthetic import SyntheticVideo

        self.num_corrupt_packets, self.num_reconnects = 0, 0
        self.video = SyntheticVideo.from_options(synthetic_options(source), frame_rate)
        self._loop, self._stopped = loop, False
        height, width = self.video.size_px
        duration = None if loop else self.video.duration_seconds
        self.info = StreamInfo(str(source), width, height, self.video.frame_rate, False, duration)

    def frames(self) -> Iterator[Frame]:
        index = 0
        while not self._stopped and (self._loop or self.video.num_frames is None or index < self.video.num_frames):
            inside = index if self.video.num_frames is None else index % self.video.num_frames
            yield dataclasses.replace(self.video.frame(inside), index=index, pts_seconds=index / self.video.frame_rate)
            index += 1

    def stop(self) -> None:
        self._stopped = True

    def close(self) -> None:
        pass


def image_paths(folder: Source) -> list[Path]:
    """The images of a folder, in natural order.

    Raises:
        SourceError: there is none.
    """
    try:
        names = [entry.name for entry in os.scandir(str(folder)) if entry.is_file()]
    except OSError as error:
        raise SourceError(f"cannot list {folder}: {error.strerror}; check the path and its permissions") from error
    images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")]
    if not images:
        raise SourceError(f"folder {folder} holds no image ({', '.join(IMAGE_SUFFIXES)}); give another folder")
    return [Path(str(folder)) / name for name in sorted(images, key=natural_order)]


def natural_order(name: str) -> list[Any]:
    """A sorting key in which runs of digits count as numbers: f2 before f10."""
    parts = re.split(r"(\d+)", name.lower())
    return [[int(part) if i % 2 else part for i, part in enumerate(parts)], name]


def _read_image(path: Path) -> Tensor | None:
    """uint8 RGB, shape (H, W, 3), upright; None when the file is damaged."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16-bit grey
                grey = (np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                return torch.from_numpy(np.repeat(grey[:, :, None], 3, axis=2))
            return torch.from_numpy(np.array(upright.convert("RGB")))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
