"""``ClipDataset``: labelled clips, map-style; each item is a function of (seed, epoch, index) and of the files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sidestream.data.joints import PointSource, points_of_clip
from sidestream.data.pictures import OpenPictures, PictureStore, Times, file_pictures
from sidestream.data.record import ClipRecord, check_labels, check_stretch
from sidestream.data.sampling import Short, clip_indices, possible_starts, random_generator, spread_start
from sidestream.errors import InputError, LayoutError
from sidestream.types import Clip, Frame, InputSpec
from sidestream.video import prepare
from sidestream.video.prepare import placement

log = logging.getLogger("sidestream.data")

Part = Literal["train", "test"]
CROP_MARGIN = 8 / 7
"""With random crops and no ``resize_px``, pictures are resized to this times the size that is cut out of them."""
PLAIN = InputSpec(size_px=(64, 64), mean=(0, 0, 0), std=(1, 1, 1), layout="BTCHW", num_frames=8)
"""Where no model says what it wants: 8 frames of 64 x 64 pixels, values in [0, 1]."""


class ClipItem(NamedTuple):
    """One clip as a model wants it."""

    clip_TCHW: Tensor
    """float32: pixels in [0, 1], less the spec's mean, by its std (so in [0, 1] with mean 0 and std 1)."""
    label: int
    key: str
    pts_seconds: Times
    """Presentation times of the T frames that were used."""
    points_TP3: Tensor | None = None
    """Of data sets with keypoints: x, y in pixels of the clip's pictures, and 1 where the point lies inside, else 0."""


@dataclass(frozen=True, slots=True)
class ClipOptions:
    """How clips are taken from records."""

    seed: int = 0
    num_clips: int = 1
    """Clips of each test record, evenly spread; a single one is centred."""
    short: Short = "repeat"
    """A stretch that is too short holds its last frame ("repeat") or begins again ("loop")."""
    frame_rate: float | None = None
    """Count the spec's frame step in frames of this rate (frames a second), by time; None: in the video's own."""
    random_crop: bool = False
    """Train: cut the picture out at a random place, the same for all frames of a clip."""
    random_flip: bool = False
    """Train: mirror half of the clips left-right (not where left and right are classes)."""
    cache_bytes: int = 512 * 2**20
    """Memory for decoded, resized uint8 frames; 0 decodes every time."""


class ClipDataset(Dataset[ClipItem]):
    """``len``, ``dataset[index] -> ClipItem``; with torch's own DataLoader call ``set_epoch`` for new random clips.

    Args:
        records: what there is; ``class_names[label]`` names a label.
        part: "train" takes a random start, drawn by (seed, epoch, index); "test" takes spread, fixed ones.
        spec: what the model wants: frames, step, size, mean, std.
        open_pictures: reads a record; by default files and folders of images.
        points: where keypoints come from; records without any are left out.

    Raises:
        InputError: no records, labels out of range, or options that make no sense.
    """

    def __init__(
        self,
        records: Sequence[ClipRecord],
        class_names: Sequence[str],
        *,
        part: Part = "train",
        spec: InputSpec = PLAIN,
        options: ClipOptions = ClipOptions(),
        name: str = "clips",
        open_pictures: OpenPictures = file_pictures,
        points: PointSource | None = None,
    ) -> None:
        if points is not None:
            records = [record for record in records if points.read(record) is not None]
        _check(records, part, spec, options, name)
        check_labels(records, len(class_names), name)
        self.records, self.class_names = tuple(records), tuple(class_names)
        self.part, self.spec, self.options, self.name = part, spec, options, name
        self.epoch = 0
        self.skipped: dict[str, str] = {}
        """Records that could not be read, by key, and why."""
        self.points = points
        self._open = open_pictures
        self._store = PictureStore(
            resized_px=self._resized_px,
            interpolation=spec.interpolation,
            open_pictures=open_pictures,
            cache_bytes=options.cache_bytes,
        )

    def __len__(self) -> int:
        return len(self.records) * self.clips_per_record

    def __getitem__(self, index: int) -> ClipItem:
        return self.item(index, self.epoch)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def clips_per_record(self) -> int:
        return self.options.num_clips if self.part == "test" else 1

    @property
    def num_cached_bytes(self) -> int:
        return self._store.num_cached_bytes

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def with_part(self, part: Part) -> ClipDataset:
        """The same records taken as ``part`` does: train clips as evaluation wants them, for example."""
        return ClipDataset(
            self.records,
            self.class_names,
            part=part,
            spec=self.spec,
            options=self.options,
            name=self.name,
            open_pictures=self._open,
            points=self.points,
        )

    def item(self, index: int, epoch: int = 0) -> ClipItem:
        """Clip ``index`` of that epoch. Raises ``SourceError`` where no frame can be decoded."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"clip {index} of {self.name}, which has {len(self)}")
        number, clip_number = divmod(index % len(self), self.clips_per_record)
        record = self.records[number]
        chance = random_generator(self.options.seed, epoch, number)
        chosen: list[int] = []
        rgb_THWC, times = self._store.fetch(record, partial(self._choose, clip_number, chance, chosen))
        picture_px = int(rgb_THWC.shape[1]), int(rgb_THWC.shape[2])
        (top, left), is_mirrored = self._place(picture_px, chance)
        height, width = self.spec.size_px
        rgb_THWC = rgb_THWC[:, top : top + height, left : left + width]
        clip = Clip(torch.flip(rgb_THWC, (2,)) if is_mirrored else rgb_THWC, times)
        clip_BTCHW = prepare(clip, replace(self.spec, resize_px=None))
        points_TP3 = None
        if self.points is not None and (points_FP2 := self.points.read(record)) is not None:
            points_TP3 = points_of_clip(
                points_FP2,
                chosen,
                picture_px=picture_px,
                corner_px=(top, left),
                size_px=self.spec.size_px,
                swaps=self.points.swaps if is_mirrored else None,
            )
        return ClipItem(clip_BTCHW[0], record.label, record.name, times, points_TP3)

    def frames(self, record: ClipRecord) -> Iterator[Frame]:
        """Every frame of a record as it was decoded, numbered from 0; those of the synthetic sets with their truth."""
        start, end = record.start_seconds or 0.0, record.end_seconds
        if hasattr(self._open, "video"):
            yield from self._open.video(record)
            return
        number = 0
        for rgb_HWC, seconds in self._open(record, start):
            if end is not None and seconds >= end:
                return
            if seconds >= start:
                yield Frame(rgb_HWC, number, seconds - start)
                number += 1

    def skip(self, index: int, reason: Exception) -> None:
        """Note that clip ``index`` cannot be had; reported once for each record."""
        record = self.records[index // self.clips_per_record]
        if record.name not in self.skipped:
            self.skipped[record.name] = str(reason)
            log.warning("%s: skipped %s (%d so far): %s", self.name, record.name, len(self.skipped), reason)

    def _choose(self, clip_number: int, chance: np.random.Generator, chosen: list[int], times: Times) -> list[int]:
        """Indices of the clip's frames, which are also left in ``chosen``."""
        num_frames, step, rate = self.spec.num_frames, self.spec.frame_step, self.options.frame_rate
        num_starts = possible_starts(times, num_frames, step, rate)
        if self.part == "train":
            start = int(chance.integers(num_starts))
        else:
            start = spread_start(num_starts, clip_number, self.options.num_clips)
        chosen[:] = clip_indices(
            times, start=start, num_frames=num_frames, frame_step=step, short=self.options.short, frame_rate=rate
        )
        return chosen

    @property
    def _crops(self) -> bool:
        return self.part == "train" and self.options.random_crop

    def _resized_px(self, frame_size_px: tuple[int, int]) -> tuple[int, int]:
        if self._crops and self.spec.resize_px is None:
            height, width = self.spec.size_px
            return round(height * CROP_MARGIN), round(width * CROP_MARGIN)
        return placement(frame_size_px, self.spec).resized_px

    def _place(self, picture_px: tuple[int, int], chance: np.random.Generator) -> tuple[tuple[int, int], bool]:
        """Where the part that the model sees begins (top, left): in the centre, or anywhere; and if it is mirrored."""
        spare = [have - wanted for have, wanted in zip(picture_px, self.spec.size_px, strict=True)]
        top, left = (int(chance.integers(each + 1)) if self._crops else round(each / 2.0) for each in spare)
        flips = self.part == "train" and self.options.random_flip
        return (top, left), flips and bool(chance.integers(2))


def _check(records: Sequence[ClipRecord], part: str, spec: InputSpec, options: ClipOptions, name: str) -> None:
    if not records:
        raise InputError(f"{name} has no clip for the part {part!r}; give a data set with at least one")
    if part not in ("train", "test"):
        raise InputError(f"{part = }; expected 'train' or 'test'")
    if options.short not in ("repeat", "loop"):
        raise InputError(f"short is {options.short!r}; expected 'repeat' or 'loop'")
    if options.num_clips < 1 or options.seed < 0 or options.cache_bytes < 0:
        raise InputError(
            f"num_clips={options.num_clips}, seed={options.seed}, cache_bytes={options.cache_bytes}; "
            "give 1 or more clips, and 0 or more for the others"
        )
    if options.frame_rate is not None and not options.frame_rate > 0:
        raise InputError(f"frame_rate={options.frame_rate}; give frames per second above 0, or None")
    if spec.num_frames < 1 or spec.frame_step < 1 or min(spec.size_px) < 1:
        raise LayoutError(
            f"clips of {spec.num_frames} frames, step {spec.frame_step}, size {spec.size_px}; give 1 or more of each"
        )
    for record in records:
        check_stretch(record)
