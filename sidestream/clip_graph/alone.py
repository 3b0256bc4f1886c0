"""Whether an operation treats every frame alike and by itself: it is tried on numbers by chance, on all frames
together and on each alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx

from sidestream.clip_graph.arguments import NoStep
from sidestream.clip_graph.exported import Call
from sidestream.clip_graph.place import Place, places
from sidestream.clip_graph.rules import Fixed

if TYPE_CHECKING:
    from sidestream.clip_graph.analysis import Analysis

Found = Place | None | Literal["no frames"]
Constants = dict[fx.Node, tuple[Place, int]]


MIXES = "it mixes frames: what it makes of one frame depends on others of the clip"


def works_alone(
    known: Analysis, node: fx.Node, call: Call, timed: Sequence[fx.Node]
) -> tuple[Found | list[Found], Constants]:
    """Where time lies in what ``node`` makes (None: nowhere, as in what goes in), and which fixed values are taken
    for one frame. Of several results some may be without frames. NoStep where frames are not treated alike and alone.
    """
    num, longer_num = known.lengths[timed[0]]
    constants = _constants(known, node, num, longer_num)
    if known.times[timed[0]].place is None:
        if call.depends_on_length:
            raise NoStep("it computes with the number of frames, which a stream does not have (for a mean, write mean)")
        made = known.example(node)[1]
        return ([None] * len(made) if isinstance(made, list | tuple) else None), constants
    if not call.depends_on_length and (place := _pointwise(known, node, timed, constants)) is not None:
        return place, constants
    chance = torch.Generator().manual_seed(0)
    given = {n: _by_chance(known.example(n)[1], chance) for n in timed}

    def whole(n: fx.Node) -> Any:
        return given[n] if n in given else known.times[n].value

    picks = sorted({0, 1, longer_num // 2, longer_num - 1} & set(range(longer_num)))
    with torch.no_grad():
        together = call(whole, longer_num)
        try:
            alone = [call(partial(_frame, known, given, constants, k, longer_num), 1) for k in picks]
        except (RuntimeError, IndexError):
            raise NoStep(MIXES) from None
    short, long = known.example(node)
    if num == longer_num and isinstance(together, Tensor):  # the first frames only: no axis tells itself by growing
        return _same_place(known.times[timed[0]].place, together, alone, picks, num), constants
    if isinstance(together, Tensor):
        return _place(together, alone, picks, short, long, num, longer_num), constants
    parts: list[Found] = []
    for k in range(len(together)):
        try:
            parts.append(_place(together[k], [a[k] for a in alone], picks, short[k], long[k], num, longer_num))
        except NoStep:
            parts.append("no frames")
    if not any(isinstance(part, Place) for part in parts):
        raise NoStep(MIXES)
    return parts, constants


def _pointwise(known: Analysis, node: fx.Node, timed: Sequence[fx.Node], constants: Constants) -> Place | None:
    """Where time lies in the result of an operation that torch calls pointwise, on inputs with time at one place."""
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()) or constants:
        return None
    made = known.example(node)[1]
    place = known.times[timed[0]].place
    shapes = [known.example(n)[1].shape for n in timed]
    if not isinstance(made, Tensor) or any(
        known.times[n].place != place or shape != made.shape for n, shape in zip(timed, shapes)
    ):
        return None
    back = made.ndim - place.axis  # axes are aligned at the end
    fixed = [known.times[n].value for n in node.all_input_nodes if n not in timed]
    return place if all(not isinstance(v, Tensor) or v.ndim < back or v.shape[-back] == 1 for v in fixed) else None


def _frame(known: Analysis, given: dict[fx.Node, Tensor], constants: Constants, k: int, num: int, n: fx.Node) -> Any:
    if n in given:
        return known.times[n].place.frame(given[n], k, num)
    if n in constants:
        place, length = constants[n]
        return place.frame(known.times[n].value, 0, length)
    return known.times[n].value


def _place(
    together: Any, alone: Sequence[Any], picks: Sequence[int], short: Any, long: Any, num: int, longer_num: int
) -> Place:
    for place in places(short.shape, num, long.shape, longer_num):
        frames = [place.frame(together, k, longer_num) for k in picks]
        if all(is_close(a, b) for a, b in zip(alone, frames)):
            return place
    raise NoStep(MIXES)


def _same_place(place: Place, together: Tensor, alone: Sequence[Any], picks: Sequence[int], num: int) -> Place:
    """Time where it lies in what goes in."""
    if together.ndim > place.axis and together.shape[place.axis] == place.before * num * place.after:
        frames = [place.frame(together, k, num) for k in picks]
        if all(is_close(a, b) for a, b in zip(alone, frames)):
            return place
    raise NoStep(MIXES)


def is_close(a: Any, b: Any) -> bool:
    """Whether two tensors are the same but for the rounding of their type."""
    if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    share = {torch.float64: 1e-9, torch.float32: 1e-4}.get(a.dtype, 3e-2)
    finite = b[b.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=share, atol=share * size, equal_nan=True)


def _by_chance(like: Tensor, chance: torch.Generator) -> Tensor:
    if like.is_floating_point():
        return torch.randn(like.shape, generator=chance, dtype=torch.float32).to(like.dtype).to(like.device)
    return torch.randint(0, 2, like.shape, generator=chance).to(like.dtype).to(like.device)


def _constants(known: Analysis, node: fx.Node, num: int, longer_num: int) -> Constants:
    """Fixed values that grow with the clip and are alike in every frame. NoStep for those that are not alike."""
    found: Constants = {}
    for n in node.all_input_nodes:
        times = known.times[n]
        if not isinstance(times, Fixed) or not times.depends_on_length:
            continue
        found[n] = constant_along_time(known, n, num, longer_num)
    return found


def constant_along_time(known: Analysis, n: fx.Node, num: int, longer_num: int) -> tuple[Place, int]:
    """Where a fixed value that grows with the clip has its frames, which are all alike."""
    short, long = known.example(n)
    for place in places(short.shape, num, long.shape, longer_num):
        frames = place.frames(known.times[n].value, longer_num)
        if all(torch.equal(frames[0], f) for f in frames[1:]):
            return place, longer_num
    raise NoStep("a table over time (a value for each frame of the clip, as a position embedding) meets the frames")
