"""JHMDB (Jhuang et al., "Towards understanding action recognition", ICCV 2013): 21 actions, official splits 1 to 3.

Expected: ``videos/CLASS/NAME.mp4`` (or .avi) and the official lists ``splits/CLASS_test_splitN.txt``, whose lines are
``NAME.avi 1`` (train) or ``NAME.avi 2`` (test).
"""

from __future__ import annotations

from pathlib import Path

from sidestream.data.record import ClipRecord
from sidestream.data.sources import Parts
from sidestream.errors import InputError

SPLITS = ("1", "2", "3")
PART_OF = {"1": "train", "2": "test"}


def jhmdb_records(folder: Path, split: str | None) -> tuple[Parts, list[str]]:
    """Records by part, and the class names in alphabetical order. ``split``: "1" (default), "2" or "3"."""
    split = split or "1"
    if split not in SPLITS:
        raise InputError(f"JHMDB has no split {split!r}; give one of {', '.join(SPLITS)}")
    lists = sorted((folder / "splits").glob(f"*_test_split{split}.txt"))
    if not lists:
        raise InputError(f"{folder}/splits has no official lists *_test_split{split}.txt; copy them there")
    classes = [file.name.removesuffix(f"_test_split{split}.txt") for file in lists]
    parts: Parts = {"train": [], "test": []}
    for label, (name, file) in enumerate(zip(classes, lists, strict=True)):
        for line in file.read_text(encoding="utf-8").splitlines():
            video, _, number = line.strip().rpartition(" ")
            if number in PART_OF:
                parts[PART_OF[number]].append(_record(folder, name, Path(video).stem, label))
    return parts, classes


def _record(folder: Path, name: str, stem: str, label: int) -> ClipRecord:
    stem_path = folder / "videos" / name / stem
    suffix = next((s for s in (".mp4", ".avi") if stem_path.with_name(stem + s).is_file()), ".mp4")
    return ClipRecord(str(stem_path.with_name(stem + suffix)), label, key=f"{name}/{stem}")
