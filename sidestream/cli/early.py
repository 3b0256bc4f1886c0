"""What can be refused at once: before torch is imported, a model is made or a stream is opened."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sidestream.errors import InputError, SourceError


def check_source(source: str) -> None:
    """Raises ``SourceError`` for a path where nothing is; cameras, addresses and the synthetic source pass."""
    is_path = "://" not in source and not source.startswith(("camera", "synthetic", "/dev/")) and not source.isdigit()
    if is_path and not Path(source).exists():
        raise SourceError(f"cannot open {source}: No such file or directory; check the path and that it may be read")


def check_files(flag: str, paths: Iterable[Path]) -> None:
    """Raises ``InputError`` for the first of the files that is not there."""
    for path in paths:
        if not path.is_file():
            raise InputError(f"{flag} {path}: there is no such file")
