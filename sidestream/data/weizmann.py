"""The Weizmann actions (Blank et al., "Actions as space-time shapes", ICCV 2005); protocol: leave actors out.

Expected: ``videos/ACTION/ACTOR_ACTION.avi``; the split names the actors that are held out.
"""

from __future__ import annotations

from pathlib import Path

from sidestream.data.record import ClipRecord
from sidestream.data.sources import Parts
from sidestream.errors import InputError


def weizmann_records(folder: Path, split: str | None) -> tuple[Parts, list[str]]:
    """Records by part, and the class names in alphabetical order. ``split``: "daria" or "daria,eli"."""
    files = sorted((folder / "videos").glob("*/*.avi"))
    classes = sorted({file.parent.name for file in files})
    actors = sorted({_actor(file) for file in files})
    held_out = {name.strip() for name in (split or "").split(",") if name.strip()}
    if not files:
        raise InputError(f"{folder}/videos holds no ACTION/ACTOR_ACTION.avi")
    if not held_out or not held_out < set(actors):
        raise InputError(
            f"Weizmann's split is the held-out actor or actors, separated by commas, but --split {split!r} was given; "
            f"there are {', '.join(actors)}: give for example {','.join(actors[:2])}"
        )
    parts: Parts = {"train": [], "test": []}
    for file in files:
        record = ClipRecord(str(file), classes.index(file.parent.name), key=f"{file.parent.name}/{file.stem}")
        parts["test" if _actor(file) in held_out else "train"].append(record)
    return parts, classes


def _actor(file: Path) -> str:
    return file.stem.partition("_")[0]
