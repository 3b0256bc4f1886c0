"""Progress of a run on stderr: a bar with the time left on a terminal, a line per epoch elsewhere; TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sidestream.errors import InputError

log = logging.getLogger("sidestream.train")


class Progress:
    """What the loop reports to."""

    def __init__(self, bar: Any, task: Any, board: Any) -> None:
        self._bar, self._task, self._board = bar, task, board

    def batch(self, done: int, epoch: int, loss: float) -> None:
        """``done``: batches of the whole run."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=f"epoch {epoch + 1}  loss {loss:.3f}")

    def epoch(self, record: Mapping[str, Any]) -> None:
        numbers = {k: v for k, v in record.items() if isinstance(v, float)}
        words = "  ".join(f"{k} {v:.4g}" for k, v in numbers.items())
        if self._bar is not None:
            self._bar.console.print(f"epoch {record['epoch'] + 1}  {words}")
        else:
            log.info("epoch %d  %s", record["epoch"] + 1, words)
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, record["epoch"] + 1)


@contextmanager
def progress(num_batches: int, folder: Path, *, tensorboard: bool, is_main: bool) -> Iterator[Progress]:
    """``num_batches``: of the whole run. Raises ``InputError`` where TensorBoard is asked for and not installed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    board = _board(folder) if tensorboard and is_main else None
    console = Console(stderr=True)
    try:
        if not (console.is_terminal and is_main):
            yield Progress(None, None, board)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, console=console) as bar:
            yield Progress(bar, bar.add_task("starting", total=num_batches), board)
    finally:
        if board is not None:
            board.close()


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            f"TensorBoard was asked for, but cannot be imported ({error}); pip install tensorboard, or leave it out"
        ) from error
    return SummaryWriter(str(folder / "tensorboard"))
