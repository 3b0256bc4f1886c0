"""A clip's graph, once it is understood, as layers one after the other."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from sidestream.clip_graph.analysis import Analysis
from sidestream.clip_graph.exported import Twins
from sidestream.clip_graph.layer import GraphLayer, Piece
from sidestream.clip_graph.rules import Fixed, Rule, Source, Timed
from sidestream.errors import ModelError


def layers_of(known: Analysis) -> list[GraphLayer]:
    """The graph in pieces, one after the other: a piece ends where a single value goes on."""
    graph = known.twins.module.graph
    answer = graph.output_node().args[0]
    assert isinstance(answer, fx.Node)
    if not isinstance(known.times[answer], Timed):
        raise ModelError("the model's answer does not depend on the clip")
    nodes = list(known.rules)
    used = _used(known, answer)
    nodes = [n for n in nodes if n in used]
    ends = _joints(known, nodes, answer)
    layers, given = [], known.input_node
    waiting: list[fx.Node] = []
    runs: list[tuple[fx.Node, fx.Node, list[fx.Node]]] = []
    for node in nodes:
        waiting.append(node)
        if node in ends:
            runs.append((given, node, waiting))
            given, waiting = node, []
    merged: list[tuple[fx.Node, fx.Node, list[fx.Node]]] = []
    for run in runs:
        if merged and _is_plain(known, merged[-1]) and _is_plain(known, run):
            first, _, own = merged.pop()
            merged.append((first, run[1], [*own, *run[2]]))
        else:
            merged.append(run)
    for run in merged:
        layers.append(_layer(known, *run))
    return layers


def _used(known: Analysis, answer: fx.Node) -> set[fx.Node]:
    used, waiting = set(), [answer]
    while waiting:
        node = waiting.pop()
        if node not in used:
            used.add(node)
            waiting += node.all_input_nodes
    return used


def _joints(known: Analysis, nodes: Sequence[fx.Node], answer: fx.Node) -> set[fx.Node]:
    """Values that all later ones depend on alone."""
    position = {known.input_node: -1, **{n: k for k, n in enumerate(nodes)}}
    last_read = dict.fromkeys(position, -1)
    for node in nodes:
        for source in known.rules[node].sources:
            last_read[source.node] = max(last_read[source.node], position[node])
    joints, reach = {answer}, last_read[known.input_node]
    for k, node in enumerate(nodes):
        times = known.times[node]
        is_single = reach <= k and isinstance(times, Timed) and times.limit is None and not known.rules[node].is_view
        if is_single and all(known.rules[n].delay >= times.delay for n in nodes[k:] if not known.rules[n].is_view):
            joints.add(node)
        reach = max(reach, last_read[node])
    return joints


def _is_plain(known: Analysis, run: tuple[fx.Node, fx.Node, list[fx.Node]]) -> bool:
    """Whether nothing is remembered in these nodes."""
    given, _, nodes = run
    start = known.times[given]
    return all(
        (t := known.rules[n]._first).delay == start.delay
        and t.period == start.period
        and known.rules[n].start() is None
        and all(s.first == 0 for s in known.rules[n].sources)
        for n in nodes
    )


def _layer(known: Analysis, given: fx.Node, answer: fx.Node, nodes: Sequence[fx.Node]) -> GraphLayer:
    start = known.times[given]
    local = {n: _since(known.times[n], start) for n in (given, *nodes)}
    rules: dict[fx.Node, Rule] = {n: _shifted(known.rules[n], local, local[n]) for n in nodes}
    fixed = _fixed_of(known, nodes)
    read = [n for n, call in fixed.items() if call is None]
    part = _part(known.twins, read)
    shapes = {n: _wire(known, n) for n in (given, answer)}
    piece = Piece(
        given, answer, local[given], *shapes[given], *shapes[answer], fixed=fixed, rules=rules,
        longer_num=known.longer_num,
    )  # fmt: skip
    return GraphLayer(piece, part)


def _since(times: Any, start: Timed) -> Any:
    """Times as they count in frames of the layer's input."""
    if times is None:
        return None
    if isinstance(times, tuple):
        return tuple(_since(t, start) for t in times)
    delay = (times.delay - start.delay) // start.period
    least = max(0, (times.least - start.delay) // start.period)
    return replace(times, period=times.period // start.period, delay=delay, least=least)


def _shifted(rule: Rule, local: dict[fx.Node, Any], local_times: Any) -> Rule:
    rule = copy.copy(rule)

    def own(source: Any) -> Any:
        if not isinstance(source, Source):
            return source
        return replace(source, times=local[source.node])

    rule.sources, rule.times = tuple(map(own, rule.sources)), local_times
    for name in ("parts", "base", "by"):
        if hasattr(rule, name):
            value = getattr(rule, name)
            setattr(rule, name, tuple(map(own, value)) if isinstance(value, tuple) else own(value))
    return rule


def _fixed_of(known: Analysis, nodes: Sequence[fx.Node]) -> dict[fx.Node, Any]:
    needed: set[fx.Node] = set()
    waiting = [n for node in nodes for n in node.all_input_nodes]
    while waiting:
        n = waiting.pop()
        if isinstance(known.times[n], Fixed) and n not in needed:
            needed.add(n)
            waiting += n.all_input_nodes
    return {n: known.calls.get(n) for n in known.twins.module.graph.nodes if n in needed}


def _part(both: Twins, read: Sequence[fx.Node]) -> nn.Module:
    part = nn.Module()
    for n in read:
        path, _, key = str(n.target).rpartition(".")
        source = both.module.get_submodule(path)
        owner = part
        for name in path.split(".") if path else ():
            if name not in owner._modules:
                owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        value = getattr(source, key)
        if isinstance(value, nn.Parameter):
            owner.register_parameter(key, value)
        elif isinstance(value, Tensor):
            owner.register_buffer(key, value)
        else:
            setattr(owner, key, value)
    return part


def _wire(known: Analysis, node: fx.Node) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of a frame of ``node`` on the wire."""
    like = known.example(node)[1]
    place = known.times[node].place
    if place is None:
        return tuple(like.shape), like.dtype
    frame = place.to_wire(place.frame(torch.empty(like.shape, device="meta"), 0, known.lengths[node][1]))
    return tuple(frame.shape), like.dtype
