"""The frames of a record, decoded once and resized, and where memory allows kept for the following epochs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sidestream.data.record import ClipRecord
from sidestream.data.sampling import nearest
from sidestream.errors import SourceError
from sidestream.video import source_kind, stream
from sidestream.video.seek import pictures_from

MAX_BYTES_AT_ONCE = 256 * 2**20
"""Of a record whose resized frames need more, only the frames of one clip are held, decoded again every time."""
SAME_TIME_SECONDS = 1e-6

Times = tuple[float, ...]
Choose = Callable[[Times], Sequence[int]]
"""From the times of a record's frames to the indices of those that are wanted."""


class OpenPictures(Protocol):
    """Yields (uint8 rgb_HWC, pts_seconds) of a record in order, from ``from_seconds`` or earlier on."""

    def __call__(self, record: ClipRecord, from_seconds: float) -> Iterator[tuple[Tensor, float]]: ...


def file_pictures(record: ClipRecord, from_seconds: float) -> Iterator[tuple[Tensor, float]]:
    """The pictures of a video file or a folder of images; one decoding thread."""
    if source_kind(record.path) == "file":
        for picture, seconds in pictures_from(record.path, from_seconds):
            yield picture.rgb_HWC, seconds
        return
    with stream(record.path, policy="lossless") as frames:
        for frame in frames:
            yield frame.rgb_HWC, frame.pts_seconds


class PictureStore:
    """Gives chosen frames of records, resized; safe to use from several threads.

    ``resized_px``: (height, width) of a frame -> to which size. ``cache_bytes``: how much to keep; the first records
    that fit stay, so that which ones are kept changes the speed and no value.
    """

    def __init__(
        self,
        *,
        resized_px: Callable[[tuple[int, int]], tuple[int, int]],
        interpolation: str = "bilinear",
        open_pictures: OpenPictures = file_pictures,
        cache_bytes: int = 0,
    ) -> None:
        self._resized_px, self._interpolation, self._open = resized_px, interpolation, open_pictures
        self._cache_bytes, self._num_bytes = cache_bytes, 0
        self._kept: dict[ClipRecord, tuple[Tensor, Times]] = {}
        self._times: dict[ClipRecord, Times] = {}
        self._lock = threading.Lock()

    @property
    def num_cached_bytes(self) -> int:
        return self._num_bytes

    def fetch(self, record: ClipRecord, choose: Choose) -> tuple[Tensor, Times]:
        """The chosen frames, uint8 (T, H, W, 3), and their times.

        Raises ``SourceError``: no frame of the record can be decoded.
        """
        if (kept := self._kept.get(record)) is not None:
            return _chosen(*kept, choose)
        if (times := self._times.get(record)) is None:
            rgb_THWC, times = self._whole(record)
            self._times[record] = times
            if rgb_THWC is not None:
                self._keep(record, rgb_THWC, times)
                return _chosen(rgb_THWC, times, choose)
        wanted = list(choose(times))
        return self._window(record, [times[i] for i in wanted]), tuple(times[i] for i in wanted)

    def _whole(self, record: ClipRecord) -> tuple[Tensor | None, Times]:
        """Every frame of the stretch, resized, None where they are too many; and their times."""
        pictures: list[Tensor] | None = []
        times: list[float] = []
        num_bytes = 0
        for rgb_HWC, seconds in self._inside(record, record.start_seconds or 0.0):
            times.append(seconds)
            if pictures is not None:
                pictures.append(self._resize(rgb_HWC))
                num_bytes += pictures[-1].numel()
                pictures = None if num_bytes > MAX_BYTES_AT_ONCE else pictures
        if not times:
            raise SourceError(
                f"{record.name} has no frame from {record.start_seconds or 0.0} to {record.end_seconds} s; "
                "correct the times, which count from the first frame"
            )
        return (None if pictures is None else self._stack(record, pictures)), tuple(times)

    def _window(self, record: ClipRecord, moments: Sequence[float]) -> Tensor:
        """The frames at these times (any order, repeats allowed), without decoding everything before them."""
        first, last = min(moments), max(moments)
        wanted = set(moments)
        found: dict[float, Tensor] = {}
        for rgb_HWC, seconds in self._inside(record, first):
            if seconds >= first - SAME_TIME_SECONDS:
                match = min(wanted, key=lambda moment: abs(moment - seconds))
                if abs(match - seconds) <= SAME_TIME_SECONDS:
                    found[match] = self._resize(rgb_HWC)
            if seconds >= last - SAME_TIME_SECONDS:
                break
        if not found:
            raise SourceError(f"{record.name} has no frame at {first:.3f} s any more; was the file changed?")
        have = sorted(found)
        return self._stack(record, [found[have[nearest(have, moment)]] for moment in moments])

    def _inside(self, record: ClipRecord, from_seconds: float) -> Iterator[tuple[Tensor, float]]:
        start, end = record.start_seconds or 0.0, record.end_seconds
        for rgb_HWC, seconds in self._open(record, from_seconds):
            if end is not None and seconds >= end:
                return
            if seconds >= start:
                yield rgb_HWC, seconds

    def _resize(self, rgb_HWC: Tensor) -> Tensor:
        size_px = self._resized_px((int(rgb_HWC.shape[0]), int(rgb_HWC.shape[1])))
        if size_px == tuple(rgb_HWC.shape[:2]):
            return rgb_HWC
        rgb_1CHW = rgb_HWC.permute(2, 0, 1).unsqueeze(0)
        return F.interpolate(rgb_1CHW, size_px, mode=self._interpolation, antialias=True)[0].permute(1, 2, 0)

    def _stack(self, record: ClipRecord, pictures: Sequence[Tensor]) -> Tensor:
        if len({picture.shape for picture in pictures}) > 1:
            raise SourceError(f"{record.name} changes its size half way; cut it where it changes")
        return torch.stack([picture.contiguous() for picture in pictures])

    def _keep(self, record: ClipRecord, rgb_THWC: Tensor, times: Times) -> None:
        with self._lock:
            if record not in self._kept and self._num_bytes + rgb_THWC.numel() <= self._cache_bytes:
                self._kept[record] = rgb_THWC, times
                self._num_bytes += rgb_THWC.numel()


def _chosen(rgb_THWC: Tensor, times: Times, choose: Choose) -> tuple[Tensor, Times]:
    wanted = list(choose(times))
    return rgb_THWC[wanted], tuple(times[i] for i in wanted)
