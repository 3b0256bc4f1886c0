"""Cutting by dotted names: where the modules that the user named begin."""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterable, Sequence

from torch import fx, nn

from sidestream.circuit.alias import call_nodes
from sidestream.circuit.split import module_paths
from sidestream.errors import CutError


def named_boundaries(graph: fx.Graph, model: nn.Module, names: Sequence[str]) -> tuple[int, ...]:
    """Position, in ``call_nodes``, of the first operation of each named module; CutError where a name does not fit."""
    check_names(names, [name for name, _ in model.named_modules() if name])
    first: dict[str, int] = {}
    for position, node in enumerate(call_nodes(graph)):
        for path in module_paths(node):
            first.setdefault(path, position)
    idle = [name for name in names if name not in first]
    if idle:
        raise CutError(f"no stage can begin at {idle[0]!r}: the model never calls that module on the example")
    boundaries = [first[name] for name in names]
    check_order(names, boundaries)
    return tuple(boundaries)


def check_names(names: Iterable[str], known: Sequence[str]) -> None:
    """CutError for a name that is not known, with the nearest ones that are."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known[:3])
            raise CutError(f"the model has no module {name!r}; the nearest names are {', '.join(map(repr, near))}")


def check_order(names: Sequence[str], positions: Sequence[int]) -> None:
    """CutError unless every named place lies behind the one before it, and the first behind the model's start."""
    previous, previous_position = "the start of the model", 0
    for name, position in zip(names, positions):
        if position <= previous_position:
            relation = "begins at" if position == previous_position else "runs before"
            raise CutError(
                f"no stage can begin at {name!r}: it {relation} {previous}, so the stage between them would be empty; "
                "give the names of later modules, in the order in which they run"
            )
        previous, previous_position = repr(name), position


def check_allowed(names: Sequence[str], boundaries: Sequence[int], forbidden: Container[int]) -> None:
    """CutError for a boundary that would part memory from an operation that changes it in place."""
    for name, boundary in zip(names, boundaries):
        if boundary in forbidden:
            raise CutError(
                f"no stage can begin at {name!r}: the stage before makes memory that this one changes in place and "
                "that both go on to use; name a module before or behind that in-place operation"
            )
