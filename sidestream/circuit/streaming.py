"""A Chain of streaming layers in stages: cut between layers and, where their steps are one graph (``segment``), inside
of them; each stage with the state of its own layers.

    layers     encoder, shift, encoder     pool of stride 2     encoder
    blocks     one graph                   whole                one graph
    stages     [.......] [........] [............ + ............ + ...] [...]      cut between nodes and whole layers

A stage over several blocks is a row of parts (``group``), each within one rate: behind a layer that swallows frames it
works only in the ticks that reach it. The balance counts a unit's measured time by its share of the ticks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sidestream.circuit.balance import balanced
from sidestream.circuit.blocks import Block, blocks_of, places_of
from sidestream.circuit.calls import NOTHING_FOUND, Found
from sidestream.circuit.group import grouped, in_a_row
from sidestream.circuit.measure import Costs
from sidestream.circuit.segment import tried
from sidestream.circuit.slice import stage_of_layers
from sidestream.circuit.stage import Link, Stage, Stages
from sidestream.errors import CutError
from sidestream.nn.combine import Chain
from sidestream.nn.steppable import Steppable


def cut_chain(
    chain: Chain,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    names: tuple[str, ...] | None,
    num_stages: int | str,
    costs: Costs,
    num_workers: int,
    found: Found = NOTHING_FOUND,
) -> Stages:
    """The stages. The example is one frame. ``found``: what a look at the plain model found."""
    blocks = blocks_of(chain, args[0], names=names, costs=costs, found=found)
    is_measured = costs == "measured"
    weights = [w / (b.input_period_ticks if is_measured else 1) for b in blocks for w in b.weights]
    if names is None:
        crossings = [size for block in blocks for size in block.crossings]
        starts = [0, *accumulate(block.num_units for block in blocks)]
        forbidden = {start + n for block, start in zip(blocks, starts) for n in block.forbidden}
        boundaries = balanced(weights, crossings, num_stages, num_workers=num_workers, forbidden=forbidden)
    else:
        boundaries = places_of(chain, blocks, names)
    fine, starts_of_stages = _fine(chain, blocks, boundaries, is_measured=is_measured)
    stages = grouped(in_a_row(fine, pytree.tree_structure((args, kwargs))), starts_of_stages)
    bounds = [0, *boundaries, len(weights)]
    costs_of = [tuple(weights[start:end]) for start, end in pairwise(bounds)]
    return stages.with_stages(tuple(replace(s, unit_costs=own) for s, own in zip(stages, costs_of, strict=True)))


def check_frame(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """CutError for an example that is not one frame."""
    if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor):
        raise CutError("a Chain is cut with one frame as the example: cut(chain, frame_BCHW)")


def _fine(
    chain: Chain, blocks: Sequence[Block], boundaries: Sequence[int], *, is_measured: bool
) -> tuple[list[Stages], list[int]]:
    """Parts that lie within one block, or are layers kept whole at one rate; and at which of them stages begin."""
    fine: list[Stages] = []
    starts: list[int] = []
    waiting: list[Block] = []  # kept whole, of the next part
    unit = 0
    for block in blocks:
        begins = unit == 0 or unit in boundaries
        changes_rate = not chain.training and any(layer.period_ticks > 1 for layer in block.layers.values())
        if waiting and (begins or block.segment is not None or changes_rate):
            fine.append(_whole(waiting, is_first=waiting[0] is blocks[0], is_measured=is_measured))
            waiting = []
        count = sum(map(len, fine))
        starts += [count] * begins
        if block.segment is None:
            waiting.append(block)
        else:
            inner = [b - unit for b in boundaries if unit < b < unit + block.num_units]
            starts += [count + n for n in range(1, len(inner) + 1)]
            fine.append(_pieces(block, inner, is_measured=is_measured))
        unit += block.num_units
    if waiting:
        fine.append(_whole(waiting, is_first=waiting[0] is blocks[0], is_measured=is_measured))
    return fine, starts


def _whole(blocks: Sequence[Block], *, is_first: bool, is_measured: bool) -> Stages:
    """Layers that are kept whole, as one stage."""
    layers = {name: layer for block in blocks for name, layer in block.layers.items()}
    values = [blocks[0].values[0], *(block.values[-1] for block in blocks)]
    seconds = sum(b.weights[0] * blocks[0].input_period_ticks / b.input_period_ticks for b in blocks)
    stage = stage_of_layers(layers, values, seconds if is_measured else None, is_first=is_first)
    stage = _timed(stage, blocks[0], list(layers.values()))
    in_spec, out_spec = pytree.tree_structure(((values[0],), {})), pytree.tree_structure(values[-1])
    links = [Link(0, n, 1, n) for n in range(stage.num_inputs)] + [Link(1, n, 2, n) for n in range(stage.num_outputs)]
    return Stages((stage,), tuple(links), in_spec, out_spec)


def _pieces(block: Block, boundaries: Sequence[int], *, is_measured: bool) -> Stages:
    assert block.segment is not None
    stages = tried(block.segment.stages(boundaries, block.weights if is_measured else None), block.values[0])
    layers = list(block.layers.values())
    return stages.with_stages(tuple(_timed(stage, block, layers) for stage in stages))


def _timed(stage: Stage, first: Block, layers: Sequence[Steppable]) -> Stage:
    """A stage over ``layers`` that begins with the block ``first``, with when it is reached and when it answers."""
    inside = Chain(*layers)
    return replace(
        stage,
        delay_ticks=first.delay_ticks + inside.delay_ticks * first.input_period_ticks,
        period_ticks=first.input_period_ticks * inside.period_ticks,
        input_period_ticks=first.input_period_ticks,
    )
