"""Records from a folder of class-named folders, or from a CSV manifest."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from sidestream.data.record import ClipRecord, stretch_name
from sidestream.errors import InputError

VIDEO_SUFFIXES = frozenset(
    ".mp4 .avi .mkv .mov .webm .m4v .mpg .mpeg .gif .flv .wmv .ts .3gp .ogv".split()  # noqa: SIM905
)
HELD_OUT = 0.2
"""Where a source has no parts of its own: so much of each class is the test part."""
PARTS = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation")}

Parts = dict[str, list[ClipRecord]]
"""Records by part, "train" and "test"."""


def folder_records(folder: Path) -> tuple[Parts, list[str]]:
    """A folder of class-named folders of videos, or one with such folders in ``train`` and ``test`` (or ``val``).

    Without these, one record in five of each class is the test part, chosen by a hash of its name: the same ones on
    every machine, and they stay when clips are added. Hidden files and files that are no videos are left out; whether
    a video can be read is found out when it is.
    """
    parts = {part: _first_folder(folder, names) for part, names in PARTS.items()}
    if parts["train"] and parts["test"]:
        roots = {part: root for part, root in parts.items() if root is not None}
        classes = sorted({name for root in roots.values() for name in _class_folders(root)})
        records: Parts = {part: _of_classes(root, folder, classes) for part, root in roots.items()}
    else:
        classes = _class_folders(folder)
        records = held_out(_of_classes(folder, folder, classes))
    if not any(records.values()):
        raise InputError(
            f"{folder} holds no video in class-named folders; expected {folder}/CLASS/clip.mp4 and so on "
            f"({', '.join(sorted(VIDEO_SUFFIXES))})"
        )
    return records, classes


def held_out(records: Sequence[ClipRecord]) -> Parts:
    """Parts by a hash of the names: in each class ``HELD_OUT`` of the records, rounded, are the test part."""
    parts: Parts = {"train": [], "test": []}
    for label in sorted({record.label for record in records}):
        own = [record for record in records if record.label == label]
        by_hash = sorted(own, key=lambda record: hashlib.sha256(record.name.encode()).digest())
        chosen = set(by_hash[: round(len(own) * HELD_OUT)])
        for record in own:
            parts["test" if record in chosen else "train"].append(record)
    return parts


def csv_records(file: Path, *, num_classes: int | None = None) -> tuple[Parts, list[str]]:
    """A manifest with the columns ``path,label[,start_seconds,end_seconds][,split]``; paths count from its folder.

    Labels are numbers from 0 on, or names (numbered in alphabetical order). ``split`` is train or test (or val).
    """
    rows = _rows(file)
    texts = [row["label"] for row in rows]
    classes = _class_names(texts, file, num_classes)
    are_numbers = all(_is_number(text) for text in texts)
    numbers = {name: n for n, name in enumerate(classes)}
    records = [_csv_record(row, file, int(row["label"]) if are_numbers else numbers[row["label"]]) for row in rows]
    if "split" not in rows[0]:
        return held_out(records), classes
    parts: Parts = {"train": [], "test": []}
    for line, (row, record) in enumerate(zip(rows, records, strict=True), start=2):
        part = next((part for part, names in PARTS.items() if (row["split"] or "").strip().lower() in names), None)
        if part is None:
            raise InputError(f"{file}, line {line}: split is {row['split']!r}; expected train or test")
        parts[part].append(record)
    return parts, classes


def _rows(file: Path) -> list[dict[str, str]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read the manifest {file}: {error}") from error
    missing = {"path", "label"} - set(rows[0] if rows else ())
    if missing:
        found = f"its columns are {', '.join(map(str, rows[0]))}" if rows else "it has no lines"
        raise InputError(f"{file}: {found}; expected path,label[,start_seconds,end_seconds][,split] in its first line")
    for line, row in enumerate(rows, start=2):
        row["path"], row["label"] = (row["path"] or "").strip(), (row["label"] or "").strip()
        if not row["path"] or not row["label"]:
            raise InputError(f"{file}, line {line}: path={row['path']!r}, label={row['label']!r}; give both")
    return rows


def _class_names(texts: Sequence[str], file: Path, num_classes: int | None) -> list[str]:
    if not all(_is_number(text) for text in texts):
        return sorted(set(texts))
    labels = [int(text) for text in texts]
    count = num_classes or max(labels) + 1
    for line, label in enumerate(labels, start=2):
        if not 0 <= label < count:
            raise InputError(f"{file}, line {line}: label {label} is outside 0 to {count - 1}; number from 0")
    return [f"class {n}" for n in range(count)]


def _csv_record(row: dict[str, str], file: Path, label: int) -> ClipRecord:
    try:
        start, end = (float(row[c]) if row.get(c) else None for c in ("start_seconds", "end_seconds"))
    except ValueError as error:
        raise InputError(f"{file}: {row['path']}: {error}; give start_seconds and end_seconds in seconds") from error
    return ClipRecord(str(file.parent / row["path"]), label, start, end, row["path"] + stretch_name(start, end))


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdigit()


def _first_folder(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _class_folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _of_classes(root: Path, folder: Path, classes: Sequence[str]) -> list[ClipRecord]:
    return [
        ClipRecord(str(path), label, key=str(path.relative_to(folder)))
        for label, name in enumerate(classes)
        if (root / name).is_dir()
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file() and not path.name.startswith(".")
    ]
