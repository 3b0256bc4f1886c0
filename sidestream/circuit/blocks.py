"""The layers of a Chain as blocks that can be divided: a layer kept whole, or a run of layers as one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sidestream.circuit.calls import Found
from sidestream.circuit.chain_costs import seconds_of, weights_of
from sidestream.circuit.measure import Costs, num_bytes
from sidestream.circuit.names import check_names, check_order
from sidestream.circuit.segment import ROOT, Segment, is_open, segment_of
from sidestream.circuit.split import module_paths
from sidestream.errors import CutError
from sidestream.nn.combine import Chain, PerFrame
from sidestream.nn.sliding import NewestFrames, SlidingWindow
from sidestream.nn.steppable import Steppable


@dataclass
class Block:
    """Consecutive layers: one that is kept whole, or those of a segment. Its units are what a cut divides."""

    layers: dict[str, Steppable]
    values: list[Any]
    """What goes into each layer, and the answer of the last."""
    delay_ticks: int
    """Of the layers before."""
    input_period_ticks: int
    segment: Segment | None = None
    weights: list[float] = field(default_factory=list)
    """Of each unit, in a tick that reaches it."""

    @property
    def crossings(self) -> list[float]:
        """Bytes that a cut before each unit would carry."""
        return [float(num_bytes(self.values[0]))] if self.segment is None else self.segment.crossings

    @property
    def forbidden(self) -> frozenset[int]:
        """Units at which no stage may begin."""
        return frozenset() if self.segment is None else self.segment.forbidden

    @property
    def num_units(self) -> int:
        return 1 if self.segment is None else len(self.segment.nodes)


def blocks_of(
    chain: Chain, frame: torch.Tensor, *, names: Sequence[str] | None, costs: Costs, found: Found
) -> list[Block]:
    """The blocks, with their weights. Layers become graphs where a cut inside of them can be of use: in eval mode,
    for costs that are measured or given per unit, or for names of modules inside."""
    plain = flat_layers(chain)
    opens = not chain.training and _wants_units(plain, names, costs)
    layers = flat_layers(chain, opens=opens) if opens else plain
    values = values_of(layers, frame)
    blocks: list[Block] = []
    for run in _runs(layers, values, names or (), opens=opens):
        blocks += _opened(chain, layers, values, run, found if opens else None)
    _weigh(blocks, costs, plain)
    return blocks


def flat_layers(chain: Chain, prefix: str = "", *, opens: bool = False) -> dict[str, Steppable]:
    """Layers of a chain, chains inside of it opened, with their dotted names. ``opens``: sliding windows too, as the
    newest frames and, behind them, the clip model."""
    flat: dict[str, Steppable] = {}
    for n, layer in enumerate(chain.layers):
        name = f"{prefix}{n}"
        if isinstance(layer, Chain):
            flat |= flat_layers(layer, f"{name}.", opens=opens)
        elif opens and isinstance(layer, SlidingWindow):
            flat |= {name: NewestFrames(layer.num_frames, period_ticks=layer.period_ticks).train(layer.training)}
            flat |= {f"{name}.model": PerFrame(layer.model).train(layer.model.training)}
        else:
            flat[name] = layer
    return flat


def values_of(layers: dict[str, Steppable], frame_BCHW: torch.Tensor) -> list[Any]:
    """What goes into each layer, and the answer; behind the first layer only shapes and types count."""
    values: list[Any] = [frame_BCHW]
    for layer in layers.values():
        values.append(layer.blank(values[-1]))
    return values


def places_of(chain: Chain, blocks: Sequence[Block], names: Sequence[str]) -> tuple[int, ...]:
    """The units at which the named layers, chains of layers, or modules inside of them begin."""
    first: dict[str, int] = {}
    unit, whole = 0, {}
    for block in blocks:
        name, layer = next(iter(block.layers.items()))
        for path in _outer(name):
            first.setdefault(path, unit)
        if block.segment is None:
            whole[name] = type(layer).__name__
        for n, node in enumerate(block.segment.nodes if block.segment else ()):
            for path in module_paths(node):
                first.setdefault(path.removeprefix(f"{ROOT}."), unit + n)
        unit += block.num_units
    known = [name for name, _ in chain.named_modules() if name]
    check_names(names, list(dict.fromkeys([*first, *known])))
    for name in names:
        if name not in first:
            inside = next((n for n in whole if name.startswith(f"{n}.")), None)
            why = f"layer {inside!r} ({whole[inside]}) stays whole" if inside else "it is never called on the example"
            raise CutError(f"no stage can begin at {name!r}: {why}")
    places = [first[name] for name in names]
    check_order(names, places)
    return tuple(places)


def _wants_units(layers: dict[str, Steppable], names: Sequence[str] | None, costs: Costs) -> bool:
    if names is not None:
        outer = {path for name in layers for path in _outer(name)}
        return any(name not in outer for name in names)
    return costs == "measured" or (not isinstance(costs, str) and len(costs) != len(layers))


def _outer(name: str) -> list[str]:
    """A layer's name and those of the chains around it."""
    return [name.rsplit(".", n)[0] for n in range(name.count(".") + 1)]


def _runs(layers: dict[str, Steppable], values: Sequence[Any], names: Sequence[str], *, opens: bool) -> list[list[str]]:
    """Names of consecutive layers that can be one graph; the others alone. A run ends where a layer or chain of
    ``names`` begins."""
    begins = {next((layer for layer in layers if name in _outer(layer)), None) for name in names}
    runs: list[list[str]] = []
    was_open = False
    for n, (name, layer) in enumerate(layers.items()):
        is_graph = opens and is_open(layer, values[n], values[n + 1])
        if is_graph and was_open and name not in begins:
            runs[-1].append(name)
        else:
            runs.append([name])
        was_open = is_graph
    return runs


def _opened(
    chain: Chain, layers: dict[str, Steppable], values: Sequence[Any], run: Sequence[str], found: Found | None
) -> list[Block]:
    """A run as one block, or each of its layers as a block where the graph cannot be had. ``found`` None: whole."""
    order = list(layers)
    first, count = order.index(run[0]), len(run)
    before = Chain(*list(layers.values())[:first])
    part = {name: layers[name] for name in run}
    inside = list(values[first : first + count + 1])
    segment = None
    if found is not None and (count > 1 or is_open(part[run[0]], inside[0], inside[1])):
        segment = segment_of(chain, list(part.values()), inside[0], inside[:-1], found)
    if segment is not None:
        return [Block(part, inside, before.delay_ticks, before.period_ticks, segment)]
    if count > 1:
        return [block for name in run for block in _opened(chain, layers, values, [name], found)]
    return [Block(part, inside, before.delay_ticks, before.period_ticks)]


def _weigh(blocks: Sequence[Block], costs: Costs, plain: dict[str, Steppable]) -> None:
    names = {name: layer for block in blocks for name, layer in block.layers.items()}
    if not isinstance(costs, str):
        count = sum(block.num_units for block in blocks)
        if len(costs) != count:
            raise CutError(
                f"{len(costs)} costs were given for {len(plain)} layers, or {count} layers and nodes; give one for each"
            )
        numbers = iter(costs)
        for block in blocks:
            block.weights = [float(next(numbers)) for _ in range(block.num_units)]
        return
    given = iter(() if costs == "measured" else weights_of(names, costs))
    for block in blocks:
        if block.segment is not None:
            block.weights = block.segment.seconds()
        elif costs == "measured":
            block.weights = seconds_of(block.layers.values(), block.values)
        else:
            block.weights = [next(given)]
