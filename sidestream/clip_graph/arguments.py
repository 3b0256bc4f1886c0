"""Arguments of a graph's operations as the rules read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from sidestream.clip_graph.place import Place
from sidestream.clip_graph.remembering import SoFar
from sidestream.clip_graph.rules import Fixed, Rule, Timed

if TYPE_CHECKING:
    from sidestream.clip_graph.analysis import Analysis


class NoStep(Exception):
    """An operation has no exact step form; the text says why."""


def arg(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def each(value: Any, count: int) -> list[int]:
    numbers = [value] * count if isinstance(value, int) else list(value)
    return numbers * count if len(numbers) == 1 else numbers


def timed_input(known: Analysis, node: fx.Node, position: int = 0) -> tuple[fx.Node, Timed, Place]:
    """The input at ``position``, when it comes, where its time is."""
    source = node.args[position]
    assert isinstance(source, fx.Node)
    times = known.times[source]
    return source, times, times.place


def only_timed(known: Analysis, node: fx.Node, source: fx.Node) -> None:
    if any(n is not source and not isinstance(known.times[n], Fixed) for n in node.all_input_nodes):
        raise NoStep("its weights are made from the clip")
    if any(isinstance(t := known.times[n], Fixed) and t.depends_on_length for n in node.all_input_nodes):
        raise NoStep("its weights depend on the number of frames")


def alone_at(place: Place, axis: int, what: str) -> None:
    if place.axis == axis and not place.is_alone:
        raise NoStep(f"{what} goes over time and another axis that are folded into one")


def so_far(known: Analysis, node: fx.Node, source: fx.Node, times: Timed, kind: str, index: int | None = None) -> Rule:
    call = known._call(node, *known.lengths[source])
    if index is not None:
        call.args[2] = index
    if times.limit is not None:
        raise NoStep("it looks at the first frames of the stream only")
    return SoFar(
        call, known.source(source), kind, known.newest, Timed(None, times.period, max(times.least, times.delay))
    )
