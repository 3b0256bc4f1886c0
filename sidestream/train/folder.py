"""The folder of a run: ``config.json``, ``log.jsonl``, the weights, the checkpoint and the curve."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sidestream.errors import InputError, WriteError
from sidestream.models.weights import save_weights
from sidestream.report import json_lines, read_json_lines, write_text
from sidestream.train.config import PLAIN_WIRING, TrainConfig
from sidestream.train.curve import draw_curve
from sidestream.train.diagnostics import draw_diagnostics

CONFIG, LOG, LAST, BEST, CURVE = "config.json", "log.jsonl", "last.safetensors", "best.safetensors", "curve.png"
SAMPLES = "samples.png"
DIAGNOSTICS, DIAGNOSTICS_PLOT = "diagnostics.jsonl", "diagnostics.png"
FREE_TO_CHANGE = frozenset({"num_workers", "checkpoint_minutes", "tensorboard", "diagnose"})
"""Options that decide no value, so that a resumed run may have others."""

log = logging.getLogger("sidestream.train")


class RunFolder:
    """Where a run leaves its files. Raises ``InputError`` for a folder that holds a run already."""

    def __init__(self, path: str | os.PathLike[str], *, resume: bool) -> None:
        self.path = Path(path)
        if resume and not (self.path / CONFIG).is_file():
            raise InputError(f"there is no run to resume in {str(self.path)!r} (no {CONFIG}); give the folder of a run")
        if not resume and (self.path / CONFIG).exists():
            raise InputError(
                f"{str(self.path)!r} holds a run already; resume it, or give another folder (nothing was changed)"
            )

    def start(self, config: TrainConfig, about: Mapping[str, Any]) -> None:
        """Make the folder and write ``config.json``."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteError(f"cannot make the folder {str(self.path)!r}: {error.strerror}") from error
        content = {"train": config.as_dict(), **about}
        write_text(self.path / CONFIG, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def check_same(self, config: TrainConfig) -> None:
        """Raises ``InputError`` where the run was begun with other options than these."""
        saved = TrainConfig().as_dict() | read_config(self.path)["train"]  # an option newer than the run: its default
        saved["wiring"] = saved["wiring"] or PLAIN_WIRING
        given = config.as_dict() | {"wiring": config.wired}
        other = {k for k in given if k not in FREE_TO_CHANGE and saved[k] != given[k]}
        if other:
            changes = ", ".join(f"{k} (was {saved[k]!r}, now {given[k]!r})" for k in sorted(other))
            raise InputError(f"a resumed run keeps its options, but these differ: {changes}; begin a new run for that")

    def note(self, *records: Mapping[str, Any], name: str = LOG) -> None:
        """Add lines to the log, or to the diagnostics."""
        with json_lines(self.path / name, append=True) as write:
            for record in records:
                write(record)

    def log_bytes(self, name: str = LOG) -> int:
        file = self.path / name
        return file.stat().st_size if file.is_file() else 0

    def cut_log(self, num_bytes: int, name: str = LOG) -> None:
        """Back to what it was at the checkpoint: what was done after it will be done again."""
        file = self.path / name
        if file.is_file():
            os.truncate(file, min(num_bytes, file.stat().st_size))

    def epochs(self) -> list[dict[str, Any]]:
        """The log's records of whole epochs."""
        file = self.path / LOG
        return [r for r in (read_json_lines(file) if file.is_file() else []) if r["kind"] == "epoch"]

    def save_weights(self, model: nn.Module, name: str) -> Path:
        return save_weights(model, self.path / name)

    def draw(self, title: str, score: str = "accuracy") -> None:
        draw_curve(self.epochs(), self.path / CURVE, title=title, score=score)
        if (file := self.path / DIAGNOSTICS).is_file():
            draw_diagnostics(read_json_lines(file), self.path / DIAGNOSTICS_PLOT, title=title)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The ``config.json`` of a run: "train" holds the options. Raises ``InputError``."""
    file = Path(path) / CONFIG
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"there is no run in {str(path)!r}: {CONFIG}: {error}") from error
    if not isinstance(content, dict) or "train" not in content:
        raise InputError(f"{str(file)!r} is no run's configuration (no 'train' in it)")
    return content
