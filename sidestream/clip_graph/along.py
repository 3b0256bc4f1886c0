"""Rules of slices, concatenation, padding and assignment along time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx
from torch.nn import functional as F

from sidestream.clip_graph.alone import constant_along_time
from sidestream.clip_graph.arguments import NoStep, alone_at, arg, so_far, timed_input
from sidestream.clip_graph.exported import Back, bound
from sidestream.clip_graph.place import Place
from sidestream.clip_graph.rules import Fixed, Rule, Source, Timed
from sidestream.clip_graph.views import Constant, InARow, Sliced, Written

if TYPE_CHECKING:
    from sidestream.clip_graph.analysis import Analysis


def _slice(known: Analysis, node: fx.Node) -> Rule | None:
    source, times, place = timed_input(known, node)
    if not _is_time(known, source, place, arg(node, 1, "dim", 0), "the slice"):
        return None
    start, end = _bounds(known, node, source, 2)
    step = arg(node, 4, "step", 1)
    if isinstance(start, Back):
        if start.frames == 1 and end == Back(0) and step == 1:
            return so_far(known, node, source, times, "last")
        raise NoStep(f"it takes the last {start.frames} frames of the clip, which are known at its end only")
    if isinstance(end, int) and end <= start:
        raise NoStep("it takes no frame")
    call = known._call(node, *known.lengths[source])
    back, most = (end.frames, None) if isinstance(end, Back) else (0, end)
    return Sliced(call, known.source(source, stride=step, first=start), start=start, back=back, most=most)


def _is_time(known: Analysis, source: fx.Node, place: Place, dim: int, what: str) -> bool:
    """Whether ``dim`` is the axis of time of ``source``; NoStep where time is folded with another there."""
    if dim % known.example(source)[1].ndim != place.axis:
        return False
    alone_at(place, place.axis, what)
    return True


def _bounds(known: Analysis, node: fx.Node, source: fx.Node, position: int) -> tuple[int | Back, int | Back]:
    twin, lengths = known.twins.shorter[node], known.lengths[source]
    pairs = [(arg(n, position, "start"), arg(n, position + 1, "end")) for n in (twin, node)]
    start = bound(pairs[0][0], pairs[1][0], *lengths, is_end=False)
    return start, bound(pairs[0][1], pairs[1][1], *lengths, is_end=True)


def _select(known: Analysis, node: fx.Node) -> Rule | None:
    source, times, place = timed_input(known, node)
    if not _is_time(known, source, place, arg(node, 1, "dim", 0), "the selection"):
        return None
    index = bound(known.twins.shorter[node].args[2], node.args[2], *known.lengths[source], is_end=False)
    if index != Back(1):
        raise NoStep(f"it takes frame {index} of the clip, which a stream has only once")
    return so_far(known, node, source, times, "last", index=0)


def _cat(known: Analysis, node: fx.Node) -> Rule | None:
    given: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
    main = next(n for n in given if not isinstance(known.times[n], Fixed))
    place = known.times[main].place
    if place is None or not _is_time(known, main, place, arg(node, 1, "dim", 0), "the concatenation"):
        return None
    parts: list[Source | Constant] = []
    offset, period = 0, known.times[main].period
    delay, least, unlimited = known.times[main].delay, 0, 0
    for n in given:
        times = known.times[n]
        if isinstance(times, Fixed):
            if times.depends_on_length:
                raise NoStep("it puts a part behind another whose length grows with the clip")
            num = times.value.shape[place.axis]
            parts.append(Constant(num, n, place))
            offset += num
            continue
        if times.period != period or times.place != place:
            raise NoStep("it joins what comes at different rates")
        least = max(least, times.least, times.delay if times.limit is not None else 0)
        if times.limit is None:
            delay = times.delay - offset * period
        if times.limit is None:
            unlimited += 1
            parts.append(known.source(n, first=-offset))
        elif unlimited:
            raise NoStep("the first frames of the stream come behind all of it")
        else:
            parts.append(known.source(n, first=-offset))
            offset += times.limit
    if unlimited > 1:
        raise NoStep("one clip is put behind another; a stream has no end where the second could begin")
    call = known._call(node, *known.lengths[main])
    return InARow(call, parts, Timed(place, period, delay, None if unlimited else offset, least))


def _pad(known: Analysis, node: fx.Node) -> Rule | None:
    source, times, place = timed_input(known, node)
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    mode = "replicate" if name.startswith("replication") else arg(node, 2, "mode", "constant")
    number = arg(node, 3, "value", 0.0) if name == "pad" else arg(node, 2, "value", 0.0)
    if name == "constant_pad_nd":
        mode = "constant"
    pads = list(node.args[1])  # type: ignore[arg-type]
    at = 2 * (known.example(source)[1].ndim - 1 - place.axis)
    left, right = pads[at : at + 2] if at < len(pads) else (0, 0)
    if left == right == 0:
        return None
    alone_at(place, place.axis, "the padding")
    if mode not in ("constant", "replicate") or min(left, right) < 0 or times.limit is not None:
        raise NoStep(f"padding of mode {mode!r} by ({left}, {right}) frames has no step form here")
    inner = [0 if n in (at, at + 1) else p for n, p in enumerate(pads)]
    number = float(number or 0.0)

    def on_frame(frame: Any) -> Any:
        if not any(inner):
            return frame
        return F.pad(frame, inner, mode, number) if mode == "constant" else F.pad(frame, inner, mode)

    made = known.example(node)[1]
    shape = tuple(1 if n == place.axis else s for n, s in enumerate(made.shape))
    blank = [Constant(num, number=number, shape=shape, dtype=made.dtype, device=made.device) for num in (left, right)]
    repeats = mode == "replicate"
    delay, least = times.delay - left * times.period, max(times.least, times.delay if repeats else 0)
    parts = (blank[0], known.source(source, first=-left), blank[1])
    call = known._call(node, *known.lengths[source])
    rule = InARow(call, parts, Timed(place, times.period, delay, None, least), on_frame=on_frame, repeats=repeats)
    return rule


def _written(known: Analysis, node: fx.Node) -> Rule | None:
    base, by = node.args[0], node.args[1]
    assert isinstance(base, fx.Node)
    assert isinstance(by, fx.Node)
    first = known.times[base], known.times[by]
    timed = [t for t in first if isinstance(t, Timed)]
    place = timed[0].place
    if place is None:
        return None
    if arg(node, 2, "dim", 0) % known.example(base)[1].ndim != place.axis:
        return None
    alone_at(place, place.axis, "the assignment")
    if arg(node, 5, "step", 1) != 1 or any(t.limit is not None or t.period != timed[0].period for t in timed):
        raise NoStep("it writes into some frames of another rate")
    lengths = tuple(e.shape[place.axis] for e in known.example(base))
    twin = known.twins.shorter[node]
    low = bound(arg(twin, 3, "start"), arg(node, 3, "start"), *lengths, is_end=False)
    high = bound(arg(twin, 4, "end"), arg(node, 4, "end"), *lengths, is_end=True)
    if isinstance(first[1], Timed) and isinstance(low, Back):
        raise NoStep("it writes a stream into the last frames of the clip")
    back = max([b.frames for b in (low, high) if isinstance(b, Back)], default=0)
    period, delays = timed[0].period, []
    parts: list[Source | Constant] = []
    for n, times in zip((base, by), first):
        shift = low if n is by and isinstance(low, int) else 0
        if isinstance(times, Timed):
            look = back if n is base and isinstance(first[1], Fixed) else 0
            delays.append(times.delay + (look - shift) * period)
            parts.append(known.source(n, first=-shift))
        elif times.depends_on_length:
            own = tuple(e.shape[place.axis] for e in known.example(n))
            at, num = constant_along_time(known, n, *own)
            parts.append(Constant(num, n, at))
        else:
            parts.append(Constant(times.value.shape[place.axis], n, place))
    call = known._call(node, *lengths)
    least = max(t.least for t in timed)
    return Written(call, parts[0], parts[1], low, high, Timed(place, period, max(delays), None, least))


ALONG: dict[str, Callable[[Any, fx.Node], Rule | None]] = {
    **dict.fromkeys(("constant_pad_nd", "pad", *(f"replication_pad{n}d" for n in (1, 2, 3))), _pad),
    "slice": _slice,
    "select": _select,
    "cat": _cat,
    "slice_scatter": _written,
}
"""Operation -> what makes its rule."""
