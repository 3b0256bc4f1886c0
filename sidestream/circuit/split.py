"""A flat graph in contiguous pieces: one GraphModule per stage, and the links that carry every value that crosses."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import fx
from torch.fx.node import Argument

from sidestream.circuit import alias
from sidestream.circuit.alias import call_nodes
from sidestream.circuit.measure import NodeRecord
from sidestream.circuit.regions import close_regions
from sidestream.circuit.stage import SOURCE, Link

_KEPT_META = ("nn_module_stack", "stack_trace", "autocast")


@dataclass(frozen=True)
class Piece:
    """The nodes of one stage, the values that it is given, and the values that it hands on."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[Argument, ...]


def split(module: fx.GraphModule, boundaries: Sequence[int]) -> tuple[list[Piece], list[Link]]:
    """Pieces that begin at the call nodes 0, ``*boundaries``; values go straight from their maker to each reader."""
    graph = module.graph
    calls, placeholders = call_nodes(graph), graph.find_nodes(op="placeholder")
    answer = list(graph.find_nodes(op="output")[0].args[0])
    home = dict.fromkeys(placeholders, SOURCE)
    home |= {node: bisect_right(boundaries, n) + 1 for n, node in enumerate(calls)}
    starts, K = [0, *boundaries, len(calls)], len(boundaries) + 1
    pieces = []
    for number in range(1, K + 1):
        nodes = calls[starts[number - 1] : starts[number]]
        outputs: list[Argument] = [n for n in nodes if any(home.get(u, K + 1) > number for u in n.users)]
        if number == K:  # constants and parameters in the answer
            outputs += [leaf for leaf in answer if not (isinstance(leaf, fx.Node) and leaf in home)]
        inputs = _inputs(nodes, home, number) or tuple(placeholders[:1])  # so that each stage goes with the frames
        pieces.append(Piece(tuple(nodes), inputs, tuple(outputs)))
    return pieces, _links(pieces, placeholders, answer, home)


def crossing_bytes(graph: fx.Graph, records: Mapping[fx.Node, NodeRecord], inputs: Sequence[fx.Node]) -> list[float]:
    """Bytes that a cut before each call node would carry: all that is made before it and read from there on."""
    calls = call_nodes(graph)
    position = {node: n for n, node in enumerate(calls)} | {graph.find_nodes(op="output")[0]: len(calls)}
    change = [0] * (len(calls) + 2)
    for node in [*inputs, *calls]:
        last = max((position[user] for user in node.users), default=-1)
        first = position.get(node, -1) + 1
        if last >= first:
            change[first] += records[node].num_bytes
            change[last + 1] -= records[node].num_bytes
    return [float(total) for total in accumulate(change[: len(calls)])]


def piece_module(
    module: fx.GraphModule, piece: Piece, class_name: str, *, copied_out: Container[fx.Node] = ()
) -> fx.GraphModule:
    """The piece as a module of its own: flat inputs, a tuple out, the same parameters under the same names.

    ``copied_out``: nodes that are handed on as copies.
    """
    graph, copies = fx.Graph(), {}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:  # a parameter, buffer or submodule, fetched where it is first used
            copies[node] = graph.node_copy(node)
            copies[node].meta = {}
        return copies[node]

    for node in piece.inputs:
        copies[node] = graph.placeholder(node.name)
    for node in piece.nodes:
        for attribute in node.all_input_nodes:
            copied(attribute)
        copies[node] = graph.node_copy(node, copied)
        copies[node].meta = {k: v for k, v in node.meta.items() if k in _KEPT_META}
    made = fx.node.map_arg(piece.outputs, copied)
    shown = [n for n in piece.outputs if isinstance(n, fx.Node) and n in copied_out]
    clones = {copies[n]: graph.call_function(alias.copy_of(n), (copies[n],)) for n in dict.fromkeys(shown)}
    graph.output(fx.node.map_arg(made, lambda n: clones.get(n, n)))
    graph.lint()
    result = fx.GraphModule(module, graph, class_name)
    close_regions(result)
    return result


def module_path(node: fx.Node) -> str:
    """Dotted name of the innermost module that the node belongs to; empty for the model itself."""
    paths = module_paths(node)
    return paths[-1] if paths else ""


def module_paths(node: fx.Node) -> list[str]:
    """Dotted names of all modules that the node belongs to, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [re.sub(r"@\d+", "", entry[0]) for entry in stack.values()]


def piece_name(piece: Piece) -> str:
    """First and last module inside: "layer1.0.conv1-layer2.3.relu"."""
    names = [module_path(node) or node.name for node in piece.nodes] or ["input"]
    return names[0] if names[0] == names[-1] else f"{names[0]}-{names[-1]}"


def _inputs(nodes: Sequence[fx.Node], home: dict[fx.Node, int], number: int) -> tuple[fx.Node, ...]:
    read = [arg for node in nodes for arg in node.all_input_nodes if home.get(arg, number) < number]
    return tuple(dict.fromkeys(read))


def _links(
    pieces: Sequence[Piece], placeholders: list[fx.Node], answer: list[Argument], home: dict[fx.Node, int]
) -> list[Link]:
    made = [tuple(placeholders), *(piece.outputs for piece in pieces)]
    K, links = len(pieces), []
    for target, wanted in enumerate([*(piece.inputs for piece in pieces), answer], start=1):
        constants = iter(n for n, leaf in enumerate(made[K]) if not (isinstance(leaf, fx.Node) and leaf in home))
        for index, value in enumerate(wanted):
            if isinstance(value, fx.Node) and value in home:
                links.append(Link(home[value], made[home[value]].index(value), target, index))
            else:
                links.append(Link(K, next(constants), target, index))
    return links
