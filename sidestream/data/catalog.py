"""``open_dataset``: labelled clips by name, folder or manifest; and the catalog of the names."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sidestream.data.dataset import PLAIN, ClipDataset, ClipOptions, Part
from sidestream.data.jhmdb import jhmdb_records
from sidestream.data.joints import PointSource, jhmdb_points
from sidestream.data.shapes import SYNTHETIC, synthetic_dataset
from sidestream.data.sources import Parts, csv_records, folder_records
from sidestream.data.weizmann import weizmann_records
from sidestream.errors import InputError
from sidestream.types import InputSpec

ENVIRONMENT = "SIDESTREAM_DATA"


@dataclass(frozen=True, slots=True)
class Entry:
    """A data set that is known by name."""

    records: Callable[[Path, str | None], tuple[Parts, list[str]]]
    """(its folder, split) -> records by part, class names."""
    about: str
    licence: str
    where: str
    points: Callable[[Path], PointSource] | None = None
    """Its folder -> the keypoints of its records, for sets that have some."""


CATALOG: dict[str, Entry] = {
    "jhmdb": Entry(
        jhmdb_records,
        "JHMDB: 928 clips of 15 to 40 frames, 21 actions; official splits 1 to 3",
        "research use (from HMDB51)",
        "http://jhmdb.is.tue.mpg.de (Jhuang et al., ICCV 2013)",
        jhmdb_points,
    ),
    "weizmann": Entry(
        weizmann_records,
        "Weizmann actions: 90 clips, 10 actions by 9 actors; the split names the held-out actors",
        "research use",
        "https://www.wisdom.weizmann.ac.il/~vision/SpaceTimeActions.html (Blank et al., ICCV 2005)",
    ),
}


def open_dataset(
    source: str | os.PathLike[str],
    *,
    part: Part = "train",
    split: str | int | None = None,
    root: str | os.PathLike[str] | None = None,
    spec: InputSpec = PLAIN,
    options: ClipOptions = ClipOptions(),  # noqa: B008 (frozen)
    num_classes: int | None = None,
    with_points: bool = False,
) -> ClipDataset:
    """The ``part`` of a labelled data set.

    Args:
        source: a folder of class-named folders (optionally below ``train`` and ``test``), a ``.csv`` manifest, or a
            name: "jhmdb", "weizmann", or one that needs no files: "synthetic" (direction of motion),
            "synthetic_shapes", "synthetic_both".
        split: jhmdb: 1, 2 or 3 (default 1); weizmann: the held-out actor or actors, "daria" or "daria,eli".
        root: the folder that holds the named sets (default: the environment variable SIDESTREAM_DATA).
        spec: what the model wants; frames, step, size, mean and std are taken from it.
        num_classes: for manifests with numbers as labels.
        with_points: items hold keypoints too (jhmdb: 15 joints; synthetic: 5 points of the shape); records without
            any are left out.

    Raises:
        InputError: unknown name, no such folder, no clip in it, a split that does not exist, labels out of range, or
            no keypoints where they are wanted.
    """
    name = str(source)
    split = None if split is None else str(split)
    if name in SYNTHETIC:
        return synthetic_dataset(name, part=part, spec=spec, options=options, with_points=with_points)
    points: PointSource | None = None
    if with_points:
        points = _points_of(name, root)
    if name in CATALOG:
        parts, classes = CATALOG[name].records(_folder_of(name, root), split)
        what = f"{name}, split {split}" if split else name
    else:
        parts, classes = _from_path(Path(name), split, num_classes)
        what = name
    name = f"{what}, {part} part"
    return ClipDataset(parts[part], classes, part=part, spec=spec, options=options, name=name, points=points)


def _points_of(name: str, root: str | os.PathLike[str] | None) -> PointSource:
    if (entry := CATALOG.get(name)) is None or entry.points is None:
        have = ", ".join([*(n for n, each in CATALOG.items() if each.points is not None), *SYNTHETIC])
        raise InputError(f"{name} has no keypoints; those with keypoints are {have}")
    return entry.points(_folder_of(name, root))


def _from_path(path: Path, split: str | None, num_classes: int | None) -> tuple[Parts, list[str]]:
    if split is not None:
        raise InputError(f"{split = } was given for {path}; only {', '.join(CATALOG)} have splits by name")
    if path.is_dir():
        return folder_records(path)
    if path.is_file() and path.suffix.lower() == ".csv":
        return csv_records(path, num_classes=num_classes)
    names = ", ".join([*CATALOG, *SYNTHETIC])
    raise InputError(f"unknown data {str(path)!r}: no folder, no .csv file, and no name; the names are {names}")


def _folder_of(name: str, root: str | os.PathLike[str] | None) -> Path:
    given = root if root is not None else os.environ.get(ENVIRONMENT)
    if not given:
        raise InputError(
            f"where is {name!r}? Give the folder that holds it as root, or set {ENVIRONMENT}; "
            f"it comes from {CATALOG[name].where}"
        )
    folder = Path(given) / name
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {str(folder)!r}; give the one that holds {name!r} as root, or set {ENVIRONMENT}; "
            f"it comes from {CATALOG[name].where}"
        )
    return folder
