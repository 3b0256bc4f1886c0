"""A run's checkpoint: one safetensors file with weights, optimiser states and, as JSON, where the run stands.

It is written beside its place, flushed to the disk and renamed, so that at any moment there is one whole checkpoint,
the older or the newer. Nothing is pickled. There is no state of random generators in it, because a run has none:
every batch seeds them from (seed, epoch, batch).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.errors import InputError, WriteError
from sidestream.models.weights import misfits
from sidestream.report import write_beside

NAME = "checkpoint.safetensors"
FORMAT = "sidestream-run-1"


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    position: Mapping[str, Any],
    rule_state: Mapping[str, Any] | None = None,
) -> None:
    """``position``: plain values, for JSON. ``rule_state``: plain values and tensors. Raises ``WriteError``."""
    from safetensors.torch import save_file

    tensors = {f"model/{key}": value for key, value in model.state_dict().items()}
    plain: dict[str, Any] = {}
    for number, optimizer in enumerate(optimizers):
        for index, entries in optimizer.state_dict()["state"].items():
            for name, value in entries.items():
                place = f"optimizer/{number}/{index}/{name}"
                (tensors if isinstance(value, Tensor) else plain)[place] = value
    plain_rule = _parted(rule_state or {}, "rule", tensors)
    ready = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    note = json.dumps({"position": position, "optimizer": plain, "rule": plain_rule}, allow_nan=False)
    try:
        with write_beside(folder / NAME) as part:
            save_file(ready, part, metadata={"format": FORMAT, "run": note})
            with part.open("rb+") as written:
                os.fsync(written.fileno())
    except WriteError:
        raise
    except Exception as error:
        raise WriteError(f"cannot write the checkpoint in {str(folder)!r}: {error}") from error


def load_checkpoint(
    folder: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[dict[str, Any], Any]:
    """Fill the model and the optimisers; gives back the position, and the rule's own state.

    Raises ``InputError`` where there is no checkpoint, or one of another model.
    """
    tensors, note = _read(folder / NAME)
    own = model.state_dict()
    given = {key.removeprefix("model/"): value for key, value in tensors.items() if key.startswith("model/")}
    if wrong := misfits({k: v.shape for k, v in own.items()}, {k: v.shape for k, v in given.items()}):
        raise InputError(f"the run in {str(folder)!r} is one of another model: {'; '.join(wrong)}; give its own")
    model.load_state_dict(given)
    entries = {k: v for k, v in {**tensors, **note["optimizer"]}.items() if k.startswith("optimizer/")}
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Any]] = {}
        for place, value in entries.items():
            _, own_number, index, name = place.split("/")
            if int(own_number) == number:
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return note["position"], _joined(note.get("rule", {}), tensors)


def _parted(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` for JSON, its tensors put into ``tensors`` under the names of their places."""
    if isinstance(value, Tensor):
        tensors[place] = value
        return {"tensor": place}
    if isinstance(value, Mapping):
        return {key: _parted(each, f"{place}/{key}", tensors) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_parted(each, f"{place}/{n}", tensors) for n, each in enumerate(value)]
    return value


def _joined(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of ``_parted``."""
    if isinstance(value, dict):
        if set(value) == {"tensor"} and isinstance(value["tensor"], str):
            return tensors[value["tensor"]]
        return {key: _joined(each, tensors) for key, each in value.items()}
    return [_joined(each, tensors) for each in value] if isinstance(value, list) else value


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import safe_open

    if not file.is_file():
        raise InputError(f"there is no run to resume: {str(file)!r} does not exist; give the folder of a run")
    try:
        with safe_open(file, "pt") as content:
            metadata = content.metadata() or {}
            tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 (not a dict)
        note = json.loads(metadata["run"])
    except Exception as error:
        raise InputError(f"{str(file)!r} cannot be read as a run's checkpoint: {error}") from error
    return tensors, note
