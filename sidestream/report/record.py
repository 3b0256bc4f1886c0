"""Files that a run leaves behind: JSON lines as they come, and whole files, written beside and then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sidestream.errors import WriteError

Record = Mapping[str, Any]
FilePath = str | os.PathLike[str]


@contextmanager
def json_lines(path: FilePath, *, append: bool = False) -> Iterator[Callable[[Record], None]]:
    """``with json_lines("answers.jsonl") as write: write({...})``; each record is a line, flushed at once.

    A new file grows under ``path + ".part"`` and gets its name at the end, also when the run is interrupted
    (Ctrl-C); when it fails, nothing is left and what was there before stays. With ``append`` the lines go to the end
    of ``path`` itself. Raises ``WriteError`` when the file cannot be written or a record is not plain JSON.
    """
    if append:
        with _open(Path(path), "a") as file:
            yield lambda record: _write_line(file, record)
        return
    with write_beside(path, keep_on_interrupt=True) as part, _open(part, "w") as file:
        yield lambda record: _write_line(file, record)


@contextmanager
def write_beside(path: FilePath, *, keep_on_interrupt: bool = False) -> Iterator[Path]:
    """Gives ``path + ".part"`` to write to; renames it to ``path`` at the end, removes it when the body fails.

    ``keep_on_interrupt``: rename it on Ctrl-C too, for files that are whole at any time.
    """
    target = Path(path)
    part = target.with_name(target.name + ".part")
    try:
        try:
            yield part
        except KeyboardInterrupt:
            if keep_on_interrupt:
                _rename(part, target)
            raise
        _rename(part, target)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_text(path: FilePath, text: str) -> None:
    """Write a whole text file, beside and then renamed."""
    with write_beside(path) as part, _open(part, "w") as file:
        file.write(text)


def read_json_lines(path: FilePath) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; a last line that was cut off in mid-write is left out."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def _write_line(file: Any, record: Record) -> None:
    try:
        line = json.dumps(record, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise WriteError(
            f"a record cannot be written as JSON ({error}); give plain, finite values: {record}"
        ) from error
    try:
        file.write(line + "\n")
        file.flush()
    except OSError as error:
        raise WriteError(f"cannot write to {file.name!r}: {error.strerror}") from error


def _open(path: Path, mode: str) -> Any:
    try:
        return path.open(mode, encoding="utf-8")
    except OSError as error:
        raise WriteError(
            f"cannot write {str(path)!r}: {error.strerror}; give a path in a folder that exists and may be written"
        ) from error


def _rename(part: Path, target: Path) -> None:
    try:
        if part.exists():
            os.replace(part, target)
    except OSError as error:
        raise WriteError(f"cannot rename {str(part)!r} to {str(target)!r}: {error.strerror}") from error
