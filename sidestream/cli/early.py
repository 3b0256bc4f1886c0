"""What can be refused at once: before torch is imported, a model is made or a stream is opened."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sidestream.errors import InputError, SourceError, WriteError


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


def check_out_file(flag: str, path: Path) -> None:
    """Raises ``WriteError`` where no file can be written at ``path``."""
    if path.is_dir():
        raise WriteError(f"{flag} {path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise WriteError(f"{flag} {path}: there is no folder {path.parent}; make it first")
    _try_to_write(flag, path, path.parent)


def check_out_folder(flag: str, path: Path) -> None:
    """Raises ``WriteError`` where ``path`` is no folder and none can be made there. Makes nothing."""
    nearest = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not nearest.is_dir():
        raise WriteError(f"{flag} {path}: {nearest} is a file; give the name of a folder")
    _try_to_write(flag, path, nearest)


def _try_to_write(flag: str, path: Path, folder: Path) -> None:
    """A file without a name: what permissions say is not what holds for root, or on a medium that is read-only."""
    import tempfile

    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise WriteError(
            f"{flag} {path}: nothing can be written into {folder} ({error.strerror}); give a place where it can"
        ) from error
