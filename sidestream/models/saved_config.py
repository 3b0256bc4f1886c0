"""The config.json of a saved model: which model it is, and everything about it that is not a weight.

library_name        "sidestream"
sidestream_version  of the version that wrote it
name, head          what create_model makes it by
num_classes, dtype  (of all its weights)
labels              one per class, or null
input_spec          every field of InputSpec
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sidestream.errors import ModelError, WeightsError
from sidestream.models.info import ModelInfo, info_of
from sidestream.models.model_card import LIBRARY
from sidestream.types import InputSpec

CONFIG = "config.json"
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}
_FIELDS: dict[str, tuple[type, ...]] = {
    "library_name": (str,),
    "sidestream_version": (str,),
    "name": (str,),
    "head": (str,),
    "num_classes": (int,),
    "dtype": (str,),
    "labels": (list, type(None)),
    "input_spec": (dict,),
}


def config_of(net: nn.Module) -> dict[str, Any]:
    """The fields of ``net``. Raises ``ModelError`` where it has no ``ModelInfo``, or weights of several types."""
    info = info_of(net)
    if info is None:
        raise ModelError(
            f"a {type(net).__name__} without a name was given; only models of create_model are saved in folders, "
            "since they are made again by their name: use save_weights(model, 'file.safetensors') for others"
        )
    dtypes = {str(p.dtype).removeprefix("torch.") for p in net.parameters() if p.dtype.is_floating_point}
    if len(dtypes) > 1 or not dtypes <= DTYPES.keys():
        raise ModelError(f"{info.name} has weights of the types {sorted(dtypes)}; convert it to one of {list(DTYPES)}")
    return {
        "library_name": LIBRARY,
        "sidestream_version": version(),
        "name": info.name,
        "head": head_of(info),
        "num_classes": info.num_classes,
        "dtype": next(iter(dtypes), "float32"),
        "labels": None if info.labels is None else list(info.labels),
        "input_spec": dataclasses.asdict(info.input_spec),
    }


def version() -> str:
    """Of this Sidestream."""
    return str(importlib.import_module("sidestream").__version__)  # by name: models lie below the package's front


def head_of(info: ModelInfo) -> str:
    """The ``head`` that ``create_model`` was given."""
    return info.task if info.task in ("keypoints", "masks") else "classes"


def read_config(folder: Path) -> dict[str, Any]:
    """Raises ``WeightsError`` where there is none, ``ModelError`` for one of another library or version."""
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(
            f"there is no readable {CONFIG} in {str(folder)!r} ({error.strerror}); give a folder of save_pretrained"
        ) from error
    except ValueError as error:
        raise WeightsError(
            f"{str(file)!r} is damaged: it is not JSON ({error}); save or fetch the model again"
        ) from error
    if not isinstance(config, dict) or config.get("library_name") != LIBRARY:
        raise ModelError(
            f"{str(file)!r} is not of Sidestream (no library_name {LIBRARY!r}); for weights of another library make "
            "the model by its name and give the file: create_model(name, weights=file)"
        )
    _check_fields(config, _FIELDS.keys(), file)
    for key, kinds in _FIELDS.items():
        if not isinstance(config.get(key), kinds):
            raise ModelError(f"{str(file)!r} has {key!r} = {config.get(key)!r}; expected {kinds[0].__name__}")
    if config["dtype"] not in DTYPES:
        raise ModelError(f"{str(file)!r} has the dtype {config['dtype']!r}; expected one of {', '.join(DTYPES)}")
    spec_of(config, folder)
    return config


def spec_of(config: dict[str, Any], folder: Path) -> InputSpec:
    """The input spec in a config that was read from ``folder``; a field that it lacks has its default."""
    given, file = config["input_spec"], folder / CONFIG
    _check_fields(given, {f.name for f in dataclasses.fields(InputSpec)}, file, of="input_spec ")
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return InputSpec(**fields)


def _check_fields(given: Mapping[str, Any], known: Any, file: Path, *, of: str = "") -> None:
    if unknown := sorted(given.keys() - known):
        raise ModelError(
            f"{str(file)!r} has {of}fields that this version ({version()}) does not know: "
            f"{', '.join(unknown)}; it may be of a newer version: update Sidestream"
        )
