"""``to_stream``: any clip model as an exact stream.

    stream = to_stream(r3d_18, clip_BCTHW, layout="BCTHW")     # a Chain: cut it, run it, compile it

The clip model's graph is rewritten operation by operation (``rules``): convolutions and poolings over time keep a
window of frames, their look-ahead a declared delay and their stride a rate; branches wait for each other; slices,
shifts and padding along time become delays; a mean over all of time becomes the mean so far. What has no exact step
form (attention over all frames, squeeze-and-excitation over the clip, position tables over time) is refused with the
place. The stream is compared with the model before it is given out.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sidestream.circuit.memory import kept
from sidestream.clip_graph.alone import is_close
from sidestream.clip_graph.analysis import OFFER, Analysis
from sidestream.clip_graph.exported import twins
from sidestream.clip_graph.fixed_pools import pools_over_all_time
from sidestream.clip_graph.pieces import layers_of
from sidestream.clip_graph.place import Place
from sidestream.clip_graph.rules import Timed
from sidestream.errors import LayoutError, ModelError
from sidestream.nn.combine import Chain
from sidestream.nn.steppable import step_through


def to_stream(
    clip_model: nn.Module,
    example_clip: Tensor,
    *,
    layout: str = "BTCHW",
    mean_over: int | None = None,
    check: bool = True,
) -> Chain:
    """A clip model as a chain of streaming layers that is fed one frame at a time; parameters are shared.

    ``example_clip``: a clip as the model takes it, of the batch and size of the stream; the stream takes frames like
    those of the clip, without the axis of time. ``layout``: its axes, "BTCHW", or "BCTHW" as torchvision's and
    pytorchvideo's models want it; one letter per axis.
    ``mean_over``: a mean, sum or maximum over all of the clip is one over the newest so many steps in time; None: over
    all so far, so that the last answer of a stream is the model's about all of it.
    ``check``: compare the stream with the model, on two clips of different lengths.

    The answer of step ``n`` is frame n of the model's answer, where that has an axis of time (``period_ticks`` and
    ``delay_ticks`` say when it comes), or the answer about all frames so far, where it has none.

    Raises ModelError for a model in training mode, and with the place for what has no exact step form; LayoutError for
    a clip of other axes.
    """
    axis = _axis_of_time(example_clip, layout)
    if clip_model.training:
        raise ModelError("the model is in training mode, where statistics are those of the clip; call eval() first")
    if mean_over is not None and (type(mean_over) is not int or mean_over < 1):
        raise ModelError(f"{mean_over = } is no number of steps in time; give a whole number from 1 on, or None")
    name = type(clip_model).__name__
    num = example_clip.shape[axis]
    longer = _by_chance(example_clip, axis, 2 * num, seed=1)
    with kept(clip_model), ExitStack() as stack:
        theirs = [(clip := _by_chance(example_clip, axis, num, seed=2), _answer(clip_model, clip))]
        both = twins(clip_model, example_clip, longer)
        if isinstance(both, str) and stack.enter_context(pools_over_all_time(clip_model, example_clip)):
            both = twins(clip_model, example_clip, longer)
        if isinstance(both, str):
            raise ModelError(f"{name} takes clips of {num} frames only ({both}), a stream is longer; {OFFER}")
        theirs.append((longer, _answer(clip_model, longer)))
        given = both.module.graph.find_nodes(op="placeholder")[0]
        known = Analysis(both, given, Place(axis), mean_over, num, 2 * num, example_clip.device)
        known.run(name)
        times = known.answer_times(name)
        chain = Chain(*layers_of(known)).eval()
    if check:
        for clip, answer in theirs:
            _check(answer, chain, clip.movedim(axis, 1), times, mean_over)
    return chain


def _axis_of_time(clip: object, layout: str) -> int:
    if not isinstance(clip, Tensor):
        raise LayoutError(
            f"the example is a {type(clip).__name__}; a stream has one frame per tick, so give one clip as a tensor "
            "(a model that takes several can be wrapped in a module which makes them from it)"
        )
    if len(set(layout)) != len(layout) or not {"B", "T"} <= set(layout) or layout[0] != "B":
        raise LayoutError(f"{layout = } names no axes; give one letter per axis, B first and T for time, as BTCHW")
    if clip.ndim != len(layout):
        raise LayoutError(f"a clip of shape {tuple(clip.shape)} has not the {len(layout)} axes of {layout = }")
    if "C" in layout and clip.shape[layout.index("C")] > clip.shape[layout.index("T")] in (1, 3):
        raise LayoutError(
            f"a clip of shape {tuple(clip.shape)} has {clip.shape[layout.index('C')]} channels and "
            f'{clip.shape[layout.index("T")]} frames as {layout}; torchvision\'s models take layout="BCTHW"'
        )
    axis = layout.index("T")
    if clip.shape[axis] < 2:
        raise LayoutError(f"the example has {clip.shape[axis]} frame; give a clip of the model's length, 2 or more")
    return axis


def _by_chance(clip: Tensor, axis: int, num: int, *, seed: int) -> Tensor:
    shape = [num if n == axis else s for n, s in enumerate(clip.shape)]
    chance = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=chance, dtype=torch.float32).to(clip.dtype).to(clip.device)


def _answer(model: nn.Module, clip: Tensor) -> Tensor:
    with torch.no_grad():
        return next(leaf for leaf in pytree.tree_leaves(model(clip)) if isinstance(leaf, Tensor))


def _check(theirs: Tensor, chain: Chain, frames: Tensor, times: Timed, mean_over: int | None) -> None:
    """The stream's steps, its clip form and the model say the same."""
    with torch.no_grad():
        ours, _ = step_through(chain, frames, and_finish=True)
        whole = chain(frames)
    _same(whole, ours, "the stream's steps and its clip form")
    if times.place is not None:
        num = theirs.shape[times.place.axis] // (times.place.before * times.place.after)
        _same(times.place.to_clip(theirs, num), whole, "the model and the stream's clip form")
    elif mean_over is None or whole.shape[1] <= mean_over:
        _same(theirs, whole[:, -1], "the model and the last answer of the stream")


def _same(a: Tensor, b: Tensor, what: str) -> None:
    if a.shape != b.shape or not is_close(a, b):
        far = float((a - b).abs().max()) if a.shape == b.shape else float("nan")
        raise ModelError(f"{what} differ by {far:.3g} (shapes {tuple(a.shape)}, {tuple(b.shape)}); report this model")
