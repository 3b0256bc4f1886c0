"""Weights in and out of a model: strict, from local files, never through pickle.

A file fits when every key of the model is in it with the same shape and nothing is left over. Anything else is a
``WeightsError`` that names the first keys that do not fit; a model is never loaded half.
"""

from __future__ import annotations

import logging
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.errors import WeightsError, WriteError

StateDict = dict[str, Tensor]
KeyMap = Callable[[StateDict], StateDict]
"""Turns the keys of a foreign file into those of the model; gives keys back unchanged that it does not know."""

log = logging.getLogger(__name__)

_SUFFIXES = (".safetensors", ".pt", ".pth", ".pyth", ".bin")
_WRAPPERS = ("state_dict", "model", "model_state")
_NUM_NAMED = 3


def load_weights(model: nn.Module, path: str | os.PathLike[str], *, key_map: KeyMap | None = None) -> nn.Module:
    """Load the weights file at ``path`` into ``model``, strictly, and give the model back.

    Raises ``WeightsError`` when the file is missing, unreadable or does not fit; the model is then unchanged.
    """
    state = read_state(path)
    load_state(model, state if key_map is None else key_map(state), origin=repr(str(path)))
    return model


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the weights of ``model`` as a ``.safetensors`` file, beside its place first and then renamed.

    Tensors that share memory are written one by one, so that the file loads strictly into a fresh model.
    """
    from safetensors.torch import save_file

    file = Path(path)
    if file.suffix != ".safetensors":
        raise WeightsError(f"weights are written as safetensors, but the path given is {str(file)!r}; end it in that")
    part = file.with_name(file.name + ".part")
    state = {key: value.detach().cpu().contiguous().clone() for key, value in loadable(model).state_dict().items()}
    try:
        save_file(state, part)
        os.replace(part, file)
    except Exception as error:
        part.unlink(missing_ok=True)
        raise WriteError(f"cannot write the weights file {str(file)!r}: {_first_line(error)}") from error
    return file


def read_state(path: str | os.PathLike[str]) -> StateDict:
    """The tensors of a ``.safetensors`` file or one of torch's (``.pt``, ``.pth``) by key, on the CPU, unwrapped."""
    file = Path(path)
    if not file.is_file():
        raise WeightsError(f"there is no weights file {str(file)!r}; give a path to one, or weights='default'")
    if file.suffix.lower() not in _SUFFIXES:
        raise WeightsError(f"{str(file)!r} is not known as a weights file; expected one of {', '.join(_SUFFIXES)}")
    try:
        content = _read(file)
    except Exception as error:  # damaged files end in whatever the reader trips over
        raise WeightsError(
            f"{str(file)!r} cannot be read as weights ({type(error).__name__}: {_first_line(error)}); "
            "expected a safetensors file, or a state dict that torch.load(weights_only=True) accepts"
        ) from error
    return _unwrap(content, file)


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, origin: str) -> None:
    """Copy ``state`` into ``model``, strictly; ``origin`` says in the error where it came from."""
    target = loadable(model)
    given = dict(state)
    undo = grow_for(target, given)
    own = target.state_dict()
    for key in own.keys() - given.keys():
        if key.endswith(".num_batches_tracked"):  # absent from old files, and no answer depends on it
            given[key] = own[key]
    if problems := misfits({k: v.shape for k, v in own.items()}, {k: v.shape for k, v in given.items()}):
        if undo is not None:
            undo()
        raise WeightsError(
            f"the weights in {origin} do not fit {type(target).__name__}: {'; '.join(problems)}. "
            "Give the file that belongs to this model (see 'sidestream models'), and its num_classes if it has its own"
        )
    fitting = OrderedDict(given)
    fitting._metadata = getattr(own, "_metadata", {})  # type: ignore[attr-defined]  # versions, which files do not hold
    target.load_state_dict(fitting, strict=True)


def grow_for(model: nn.Module, state: Mapping[str, Tensor]) -> Callable[[], object] | None:
    """Give ``model`` the parts that ``state`` has and it may lack (feedback); what takes them away again, if any."""
    grow = getattr(loadable(model), "grow_for", None)
    return None if grow is None else grow(state)


def misfits(own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with ``given`` shapes by key, one phrase per kind with its count; empty when they fit."""
    kinds = {
        "missing": [k for k in own if k not in given],
        "unexpected": [k for k in given if k not in own],
        "of another shape": [
            f"{k} (file {tuple(given[k])}, model {tuple(own[k])})" for k in own if k in given and given[k] != own[k]
        ],
    }
    return [f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in kinds.items() if keys]


def loadable(model: nn.Module) -> nn.Module:
    """The module whose keys a weights file has: the library's own net where ``model`` only wraps it."""
    inner = getattr(model, "weights_target", None)
    return inner if isinstance(inner, nn.Module) else model


def drop_keys(*prefixes: str) -> KeyMap:
    """A key map that leaves out the keys with these prefixes (heads that only training uses)."""
    return lambda state: {k: v for k, v in state.items() if not k.startswith(prefixes)}


def rename_keys(pattern: str, replacement: str) -> KeyMap:
    """A key map that rewrites keys with a regular expression."""
    rule = re.compile(pattern)
    return lambda state: {rule.sub(replacement, k): v for k, v in state.items()}


def _read(file: Path) -> Any:
    if file.suffix.lower() == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def _unwrap(content: Any, file: Path) -> StateDict:
    for name in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            log.info("%s: using its entry %r", file, name)
            content = content[name]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise WeightsError(
            f"{str(file)!r} holds no weights by name (found {type(content).__name__}); expected a state dict, "
            f"or one under the key {' or '.join(map(repr, _WRAPPERS))}"
        )
    if all(k.startswith("module.") for k in content):
        log.info("%s: its keys begin with 'module.' (left by a parallel wrapper); taken off", file)
        content = {k.removeprefix("module."): v for k, v in content.items()}
    return dict(content)


def _some(keys: list[str]) -> str:
    more = len(keys) - _NUM_NAMED
    return ", ".join(keys[:_NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no further reason given")[:200]
