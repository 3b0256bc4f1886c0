"""Write video: ``VideoWriter`` frame by frame, ``write`` all at once. Written beside, renamed when complete."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from sidestream.errors import LayoutError, WriteError
from sidestream.types import Clip, Frame, Sound
from sidestream.video.letterbox import letterbox
from sidestream.video.sound_track import SoundTrack

# suffix -> (container, video codec, its options, sound codec)
FORMATS: dict[str, tuple[str, str, dict[str, str], str]] = {
    ".mp4": ("mp4", "libx264", {"preset": "veryfast"}, "aac"),
    ".m4v": ("mp4", "libx264", {"preset": "veryfast"}, "aac"),
    ".mov": ("mov", "libx264", {"preset": "veryfast"}, "aac"),
    ".mkv": ("matroska", "libx264", {"preset": "veryfast"}, "aac"),
    ".webm": ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "b": "0"}, "libopus"),
}
BT601, LIMITED_RANGE = 6, 1
"""How the colours are written, and said to be in the file, so that a reader does not have to guess."""


class VideoWriter:
    """Writes H.264 (or VP9 for .webm) in yuv420p. Use it in a ``with`` block and ``add`` frames.

    Everything goes to ``NAME.part.SUFFIX`` beside the target, which is renamed when the block ends. Ctrl-C inside
    the block finishes the file with the frames so far; any other exception removes it, and so does a block without
    frames. An odd width or height is made even by repeating the last column or row.

    Args:
        path: ends in .mp4, .m4v, .mov, .mkv or .webm.
        frame_rate: nominal rate; frames that come without a time follow each other at it.
        size_px: (height, width); default: of the first frame. Every frame must have it, unless ``fit``.
        fit: frames of another size are scaled into ``size_px``, shape kept, with black bars (``letterbox``).
        crf: quality, 0 (lossless) to 51; 17 to 28 is usual.
        sound: written along with the pictures, at its own ``start_seconds``.

    Raises:
        WriteError: the place cannot be written, or its suffix is not known.
        LayoutError: a frame of the wrong type, or of the wrong size without ``fit``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        frame_rate: float,
        size_px: tuple[int, int] | None = None,
        crf: int = 20,
        sound: Sound | None = None,
        fit: bool = False,
    ) -> None:
        self.path = Path(path)
        _check_target(self.path, frame_rate, crf)
        self.part_path = self.path.with_name(f"{self.path.stem}.part{self.path.suffix}")
        self.num_frames = 0
        self._rate = Fraction(frame_rate).limit_denominator(1001)
        self._ticks_per_second = time_scale(self._rate)
        self._crf, self._sound, self._size_px, self._fit = crf, sound, size_px, fit
        self._last_tick = -1
        self._closed = False
        self._track: SoundTrack | None = None
        self._container: Any = _open_part(self.part_path, FORMATS[self.path.suffix.lower()][0])
        self._stream: Any = None

    def add(self, frame: Frame | Tensor | np.ndarray, pts_seconds: float | None = None) -> None:
        """Append a picture: a Frame (shown at its own time) or uint8 RGB of shape (H, W, 3).

        ``pts_seconds`` is when it is shown; it must grow from frame to frame. Default: the Frame's time, or for bare
        pixels one frame period after the frame before.
        """
        rgb_HWC = frame.rgb_HWC if isinstance(frame, Frame) else frame
        if pts_seconds is None and isinstance(frame, Frame):
            pts_seconds = frame.pts_seconds
        pixels = _checked_pixels(rgb_HWC)
        if self._stream is None:
            self._size_px = self._size_px or (pixels.shape[0], pixels.shape[1])
            self._start_streams(self._size_px)
        if self._fit and self._size_px is not None:
            pixels = letterbox(pixels, self._size_px)
        if pixels.shape[:2] != self._size_px:
            raise LayoutError(
                f"frame is {pixels.shape[:2]} but {self.path} is {self._size_px}; resize it first, or give fit=True"
            )
        self._encode(pixels, self._tick(pts_seconds))

    def close(self) -> None:
        """Finish the file and give it its name. Without any frame nothing is left, and WriteError says so."""
        if self._closed:
            return
        if self.num_frames == 0:
            self.discard()
            raise WriteError(f"no frame was added to {self.path}; nothing is written")
        try:
            self._container.mux(self._stream.encode(None))
            if self._track is not None:
                self._track.finish()
            self._container.close()
            os.replace(self.part_path, self.path)
            self._closed = True
        except (av.FFmpegError, OSError) as error:
            self.discard()
            raise WriteError(f"cannot finish {self.path}: {error}; is the disk full?") from error
        except BaseException:  # a second Ctrl-C, say
            self.discard()
            raise

    def discard(self) -> None:
        """Throw away what has been written."""
        self._closed = True
        with contextlib.suppress(av.FFmpegError, OSError, ValueError):
            self._container.close()
        self.part_path.unlink(missing_ok=True)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or (issubclass(kind, KeyboardInterrupt) and self.num_frames > 0):
            self.close()
        else:
            self.discard()

    def _start_streams(self, size_px: tuple[int, int]) -> None:
        _, codec, options, sound_codec = FORMATS[self.path.suffix.lower()]
        height, width = size_px
        try:
            stream = self._container.add_stream(codec, rate=self._rate, options={**options, "crf": str(self._crf)})
            stream.height, stream.width = height + height % 2, width + width % 2
            stream.pix_fmt = "yuv420p"
            context = stream.codec_context
            context.time_base = Fraction(1, self._ticks_per_second)
            context.thread_count = 1
            context.colorspace, context.color_range = BT601, LIMITED_RANGE
            if self._sound is not None:
                self._track = SoundTrack(self._container, sound_codec, self._sound)
            self._container.start_encoding()
        except (av.FFmpegError, OSError, ValueError) as error:
            self.discard()
            raise WriteError(f"cannot write {self.path} as {codec} of {size_px}: {error}") from error
        self._stream = stream

    def _tick(self, pts_seconds: float | None) -> int:
        """The time stamp of the next frame, strictly after the last one."""
        if pts_seconds is None:
            return self._last_tick + round(self._ticks_per_second / self._rate) if self.num_frames else 0
        if not math.isfinite(pts_seconds) or pts_seconds < 0:
            raise LayoutError(f"{pts_seconds = } is no time; give seconds from the start, 0 or more")
        tick = round(pts_seconds * self._ticks_per_second)
        if tick <= self._last_tick:
            last_seconds = self._last_tick / self._ticks_per_second
            raise LayoutError(
                f"{pts_seconds = } is not after the last frame ({last_seconds:.6f} s); add frames in order"
            )
        return tick

    def _encode(self, pixels: np.ndarray, tick: int) -> None:
        height, width = pixels.shape[:2]
        if height % 2 or width % 2:
            pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace="itu601")
        picture.pts, picture.time_base = tick, Fraction(1, self._ticks_per_second)
        try:
            # one call in C from end to end: Ctrl-C, which Python raises between two steps, loses no packet between them
            list(map(self._container.mux, map(self._stream.encode, (picture,))))
            if self._track is not None:
                self._track.write_until(tick / self._ticks_per_second)
        except (av.FFmpegError, OSError) as error:
            self.discard()
            raise WriteError(f"cannot write to {self.path}: {error}; is the disk full?") from error
        self._last_tick = tick
        self.num_frames += 1


def write(
    path: str | os.PathLike[str],
    frames: Clip | Iterable[Frame | Tensor | np.ndarray],
    *,
    frame_rate: float | None = None,
    sound: Sound | None = None,
    crf: int = 20,
    fit: bool = False,
) -> Path:
    """Write a clip, or frames one by one as they come, and return the path.

    Args:
        path: see ``VideoWriter``.
        frames: a Clip (its times and its sound are kept), or any iterable of Frame or uint8 (H, W, 3) pixels.
        frame_rate: nominal; needed for bare pixels, default for a Clip is its own mean rate, else 25.
        sound: written with the pictures; default for a Clip: its own.
        fit: scale frames of other sizes into the first one's, with black bars.

    Raises:
        WriteError, LayoutError: as ``VideoWriter``.
    """
    if isinstance(frames, Clip):
        sound = sound or frames.sound
        frame_rate = frame_rate or _mean_rate(frames.pts_seconds)
        begin_seconds = frames.pts_seconds[0] if frames.pts_seconds else 0.0
        if sound is not None and begin_seconds:
            sound = Sound(sound.samples_CN, sound.sample_rate_hz, sound.start_seconds - begin_seconds)
        times = [seconds - begin_seconds for seconds in frames.pts_seconds]
        timed: Iterable[tuple[Any, float | None]] = zip(frames.rgb_THWC, times, strict=True)
    else:
        timed = ((frame, None) for frame in frames)
    with VideoWriter(path, frame_rate=frame_rate or 25.0, crf=crf, sound=sound, fit=fit) as writer:
        for frame, pts_seconds in timed:
            writer.add(frame, pts_seconds)
    return writer.path


def time_scale(rate: Fraction) -> int:
    """Ticks per second: near 90,000, and such that a frame period is a whole number of ticks."""
    return rate.numerator * max(1, round(90_000 / rate.numerator))


def _mean_rate(pts_seconds: tuple[float, ...]) -> float | None:
    return None if len(pts_seconds) < 2 else (len(pts_seconds) - 1) / (pts_seconds[-1] - pts_seconds[0])


def _checked_pixels(rgb_HWC: Any) -> np.ndarray:
    pixels = rgb_HWC.detach().cpu().numpy() if isinstance(rgb_HWC, torch.Tensor) else np.asarray(rgb_HWC)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise LayoutError(f"frame is {pixels.dtype} of shape {pixels.shape}; give uint8 RGB of shape (H, W, 3)")
    return pixels


def _check_target(path: Path, frame_rate: float, crf: int) -> None:
    if path.suffix.lower() not in FORMATS:
        raise WriteError(f"cannot write {path}: suffix {path.suffix!r} is not known; use one of {', '.join(FORMATS)}")
    if path.is_dir() or not path.parent.is_dir():
        problem = "it is a folder" if path.is_dir() else f"folder {path.parent} does not exist"
        raise WriteError(f"cannot write {path}: {problem}; give a file in a folder that exists")
    if not 0 < frame_rate <= 10_000 or not 0 <= crf <= 51:
        raise WriteError(f"cannot write {path}: {frame_rate = } must be above 0 and {crf = } from 0 to 51")


def _open_part(part_path: Path, container_format: str) -> Any:
    try:
        part_path.touch()
        options = {"movflags": "+faststart"} if container_format in ("mp4", "mov") else {}
        return av.open(f"file:{part_path}", "w", format=container_format, options=options)
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WriteError(f"cannot write {part_path.parent}: {reason}; choose a place that may be written") from error
