"""In-place operations in a graph that is to be cut: no stage may change what it was given.

A stage may change memory that it made itself, before it hands it over; every later reader then sees what it would
have seen in the whole model. So no cut may fall between the node that makes a piece of memory and the last node
that changes it in place. Where that would glue too much together, or a cut is wanted right there, the change is
made on a copy, which is exact when nobody reads the old names of that memory afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sidestream.circuit.measure import CALLS, NodeRecord
from sidestream.circuit.stage import strided_copy

_MOST_GLUED = 8
"""Nodes that an in-place operation may glue together before it is made on a copy instead."""


@dataclass(frozen=True)
class Write:
    """An in-place change: by which node, of which memory, and where no cut may fall: ``first < cut <= last``."""

    node: fx.Node
    storage: Any
    members: tuple[fx.Node, ...]
    first: int
    last: int


def call_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that compute something, in order: what a cut divides."""
    return [node for node in graph.nodes if node.op in CALLS]


def place_items(graph: fx.Graph) -> None:
    """Move the ``getitem`` nodes of tuple-valued nodes right behind them, so that no tuple has to cross a cut."""
    for node in list(graph.nodes):
        if _makes_tuple(node):
            for user in [u for u in reversed(list(node.users)) if u.target is operator.getitem]:
                node.append(user)


def copy_written_inputs(graph: fx.Graph, records: Mapping[fx.Node, NodeRecord]) -> bool:
    """Let the graph work on a copy of each input that it would change; True when there was one."""
    written = {storage for r in records.values() for storage in r.writes}
    placeholders = graph.find_nodes(op="placeholder")
    changed = [node for node in placeholders if records[node].storages & written]
    for node in changed:
        with graph.inserting_after(placeholders[-1]):
            clone = _clone(graph, node, like=next(iter(node.users)))
        node.replace_all_uses_with(clone, delete_user_cb=lambda user, clone=clone: user is not clone)
    return bool(changed)


def copy_before_writes(graph: fx.Graph, records: Mapping[fx.Node, NodeRecord], wanted_cuts: Iterable[int] = ()) -> bool:
    """Put a copy before each in-place change that glues too much, or across a wanted cut; True when there was one."""
    wanted = tuple(wanted_cuts)
    position = _positions(graph)
    any_copied = False
    for write in writes(graph, records):
        is_long = write.last - write.first > _MOST_GLUED
        if is_long or any(write.first < cut <= write.last for cut in wanted):
            any_copied |= _copy_before(graph, write, position)
    return any_copied


def writes(graph: fx.Graph, records: Mapping[fx.Node, NodeRecord]) -> Iterator[Write]:
    """Every in-place change of the graph."""
    position = _positions(graph)
    for node, entry in records.items():
        for storage in entry.writes:
            members = tuple(n for n, r in records.items() if storage in r.storages and n.op != "output")
            fetched = [n for n in members if n.op == "get_attr"]  # a buffer: who fetches it is in one stage
            owners = [n for n, r in records.items() if storage in r.state]
            owners += [user for n in fetched for user in n.users if user.op in CALLS]
            places = [position[n] for n in (*members, *owners) if n.op in CALLS]
            last = max(position[n] for n in (node, *owners))
            yield Write(node, storage, members, min([*places, last]), last)


def settle_assignments(graph: fx.Graph, records: Mapping[fx.Node, NodeRecord]) -> None:
    """Move what is written to a buffer at the very end (``self.h = ...``) up to where it is known and the old value is
    read no more, so that the stage that holds the buffer need not reach to the end."""
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.copy_.default or node.users or not records[node].writes:
            continue
        buffer, value = node.args[0], node.args[1]
        if not isinstance(buffer, fx.Node) or buffer.op != "get_attr" or len(node.args) > 2:
            continue
        position = _positions(graph)
        touched = records[buffer].storages | (records[value].storages if isinstance(value, fx.Node) else frozenset())
        aliases = [n for n, r in records.items() if r.storages & touched and n.op != "output"]
        old = [n for n in aliases if records[n].storages & records[buffer].storages]
        waits = [user for n in old for user in n.users if user is not node]
        waits += [n for n, r in records.items() if r.writes & touched and n is not node]
        waits += [value] if isinstance(value, fx.Node) else []
        if any(n.op == "output" for n in waits):
            continue
        behind = max((n for n in waits if n in position), key=position.__getitem__, default=None)
        if behind is not None and position[behind] < position[node]:
            behind.append(node)


def copy_answers(graph: fx.Graph, records: Mapping[fx.Node, NodeRecord]) -> bool:
    """Where a written buffer itself is part of the answer, let the answer be a copy that is made right behind the last
    change of it; True when there was one. (What else lies in a buffer is copied when it leaves its stage.)"""
    output, position = graph.find_nodes(op="output")[0], _positions(graph)
    any_copied = False
    for node in [n for n in output.all_input_nodes if n.op == "get_attr"]:
        writers = [w.node for w in writes(graph, records) if w.storage in records[node].storages]
        if writers:
            last = max(writers, key=position.__getitem__)
            with graph.inserting_after(last):
                output.replace_input_with(node, _clone(graph, node, like=last))
            any_copied = True
    return any_copied


def in_buffers(graph: fx.Graph, records: Mapping[fx.Node, NodeRecord]) -> set[fx.Node]:
    """The nodes whose value lies in a buffer that is written: it must not leave its stage as it is."""
    state = {w.storage for w in writes(graph, records) if _is_buffer(w, records)}
    return {node for node, entry in records.items() if entry.storages & state}


def _is_buffer(write: Write, records: Mapping[fx.Node, NodeRecord]) -> bool:
    return any(n.op == "get_attr" for n in write.members) or any(write.storage in r.state for r in records.values())


def forbidden_cuts(graph: fx.Graph, records: Mapping[fx.Node, NodeRecord]) -> set[int]:
    """Positions in ``call_nodes`` before which no stage may begin."""
    position = _positions(graph)
    forbidden = {cut for w in writes(graph, records) for cut in range(w.first + 1, w.last + 1)}
    begins = None
    for node in position:  # what torch.func.vmap and its kin open, they close
        name = str(getattr(node.target, "__name__", ""))
        if name.endswith("_increment_nesting") and begins is None:
            begins, depth = position[node], 0
        if begins is not None:
            depth += name.endswith("_increment_nesting") - name.endswith("_decrement_nesting")
            if depth == 0:
                forbidden |= set(range(begins + 1, position[node] + 1))
                begins = None
        if node.op in CALLS and _makes_tuple(node):
            ends = [position[user] for user in node.users if user.target is operator.getitem]
            forbidden |= set(range(position[node] + 1, max(ends, default=0) + 1))
    return forbidden


def _positions(graph: fx.Graph) -> dict[fx.Node, int]:
    calls = call_nodes(graph)
    output = graph.find_nodes(op="output")[0]
    return {node: n for n, node in enumerate(calls)} | {output: len(calls)}


def _copy_before(graph: fx.Graph, write: Write, position: Mapping[fx.Node, int]) -> bool:
    """Let ``write`` work on a copy, where that is exact."""
    here = position[write.node]
    old_names = [n for n in write.members if n.op not in CALLS or position[n] < here]
    names_in_args = [n for n in write.node.all_input_nodes if n in write.members]
    read_later = any(position.get(user, -1) > here for n in old_names for user in n.users)
    if read_later or len(names_in_args) != 1 or any(n.op == "get_attr" for n in old_names):
        return False
    with graph.inserting_before(write.node):
        clone = _clone(graph, names_in_args[0], like=write.node)
    write.node.replace_input_with(names_in_args[0], clone)
    return True


def _clone(graph: fx.Graph, node: fx.Node, *, like: fx.Node) -> fx.Node:
    clone = graph.call_function(copy_of(node), (node,))
    clone.meta["nn_module_stack"] = like.meta.get("nn_module_stack")
    return clone


def copy_of(node: fx.Node) -> Any:
    """The operator that copies what the node makes: another one where that lies in memory with gaps, which stay."""
    made = node.meta.get("val")
    has_gaps = isinstance(made, torch.Tensor) and made.clone().stride() != made.stride()
    return strided_copy if has_gaps else torch.ops.aten.clone.default


def _makes_tuple(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (tuple, list))
