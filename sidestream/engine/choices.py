"""What ``tune`` found best for a model on this machine, kept in small files, so that the next start measures nothing.

One JSON file per model, shape, wish, machine and versions, in ``folder()``: whatever of these changes makes another
file, and an old one is never taken for it. A file that cannot be read is as none; one that cannot be written is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sidestream.engine.auto import Trial
from sidestream.report.measure import cpu_name, num_cores, package_version

log = logging.getLogger("sidestream.engine")
PACKAGES = ("sidestream", "torch", "onnxruntime", "openvino")
FORMAT = 1


@dataclass(frozen=True)
class Kept:
    """A choice: how to cut, on what to run, and all that was measured then."""

    backend: str
    executor: str
    num_stages: int
    unit_costs: tuple[float, ...]
    """Of every node, or layer kept whole: with them a cut finds the same boundaries without measuring."""
    reason: str
    trials: tuple[Trial, ...]


def folder() -> Path:
    """Where choices are kept: ``$SIDESTREAM_CACHE``, or the user's cache folder."""
    own = os.environ.get("SIDESTREAM_CACHE")
    if own:
        return Path(own) / "choices"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sidestream" / "choices"


def key_of(model: nn.Module, example: Any, wish: Mapping[str, Any]) -> str:
    """A name for a model (its modules, and the shapes of its weights), what it is fed, a wish, and this machine."""
    parts = [
        FORMAT,
        [(name, type(m).__qualname__, m.training, m.extra_repr()) for name, m in model.named_modules()],
        [(name, tuple(p.shape), str(p.dtype)) for name, p in (*model.named_parameters(), *model.named_buffers())],
        [_told(leaf) for leaf in pytree.tree_leaves(example)],
        sorted((name, repr(value)) for name, value in wish.items()),
        [cpu_name(), num_cores()],
        [(name, package_version(name)) for name in PACKAGES],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def load(key: str) -> Kept | None:
    """The choice of that name, if there is one that can be read."""
    try:
        found = json.loads((folder() / f"{key}.json").read_text(encoding="utf-8"))
        trials = tuple(Trial(**trial) for trial in found.pop("trials"))
        return Kept(**{**found, "unit_costs": tuple(map(float, found["unit_costs"])), "trials": trials})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("a kept choice cannot be read, and is measured anew: %s", error)
        return None


def keep(key: str, choice: Kept) -> None:
    """Write a choice, whole or not at all."""
    with contextlib.suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder(), suffix=".part", delete=False, encoding="utf-8") as file:
            json.dump(asdict(choice), file)
        Path(file.name).replace(folder() / f"{key}.json")


def kept_files() -> Sequence[Path]:
    """The files that are there."""
    return sorted(folder().glob("*.json")) if folder().is_dir() else []


def _told(leaf: Any) -> Any:
    return (tuple(leaf.shape), str(leaf.dtype), tuple(leaf.stride())) if isinstance(leaf, Tensor) else repr(leaf)
