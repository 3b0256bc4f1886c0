"""Rules of the operations that mix frames: convolutions, poolings, slices, concatenation, padding, means over time,
recurrent layers. Each function gives the rule of a node, or None where its time is not touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx
from torch.nn import functional as F

from sidestream.clip_graph.along import ALONG
from sidestream.clip_graph.arguments import NoStep, alone_at, arg, each, only_timed, so_far, timed_input
from sidestream.clip_graph.place import Place
from sidestream.clip_graph.remembering import Recurrent, Slid
from sidestream.clip_graph.rules import Fixed, Rule, Timed

if TYPE_CHECKING:
    from sidestream.clip_graph.analysis import Analysis


def _convolution(known: Analysis, node: fx.Node) -> Rule | None:
    if isinstance(node.args[0], fx.Node) and isinstance(known.times[node.args[0]], Fixed):
        return None
    source, times, place = timed_input(known, node)
    dims = known.example(source)[1].ndim - 2
    in_space = place.axis - 2
    if in_space < 0:
        return None
    is_general = node.target.overloadpacket is torch.ops.aten.convolution  # type: ignore[union-attr]
    if is_general and node.args[6]:
        return None
    only_timed(known, node, source)
    weight_node, bias_node = cast(fx.Node, node.args[1]), arg(node, 2, "bias")
    weight = known.times[weight_node].value
    stride, pads, dilation = (each(arg(node, n, "", d), dims) if not isinstance(arg(node, n, "", d), str)
                              else arg(node, n, "", d) for n, d in ((3, 1), (4, 0), (5, 1)))  # fmt: skip
    kernel = list(weight.shape[2:])
    if isinstance(pads, str):
        wide = [d * (k - 1) for k, d in zip(kernel, dilation)]
        if pads == "same" and any(w % 2 for w in wide):
            raise NoStep('padding="same" with an even kernel pads the ends by different numbers')
        pads = [w // 2 if pads == "same" else 0 for w in wide]
    groups: Any = node.args[8] if is_general else arg(node, 6, "groups", 1)
    alone_at(place, in_space + 2, "the convolution")
    span, pad = (kernel[in_space] - 1) * dilation[in_space], pads[in_space]
    step = stride[in_space]
    inner = [0 if n == in_space else p for n, p in enumerate(pads)]
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    channels, taps = weight.shape[1], kernel[0]
    # A window of one answer as a 2D convolution over the taps as channels: see nn.conv3d.
    folds = dims == 3 and in_space == 0 and not (channels <= 4 and channels * taps > 16)

    def on_window(window: Any, value_of: Callable[[fx.Node], Any]) -> Any:
        weight, bias = value_of(weight_node), None if bias_node is None else value_of(bias_node)
        if folds:
            flat = window[:, :, :: dilation[0]].flatten(1, 2)
            return F.conv2d(flat, weight.flatten(1, 2), bias, stride[1:], inner[1:], dilation[1:], groups).unsqueeze(2)
        return convolve(window, weight, bias, stride, inner, dilation, groups)

    return _slid(known, node, source, times, place, (span, step, pad), on_window, 0.0)


def _slid(
    known: Analysis,
    node: fx.Node,
    source: fx.Node,
    times: Timed,
    place: Place,
    window: tuple[int, int, int],
    on_window: Callable[..., Any],
    blank_value: float,
) -> Rule:
    """``window``: (span, stride, padding) along time."""
    span, step, pad = window
    if times.limit is not None:
        raise NoStep("a window goes over the first frames of the stream only")
    if pad > span:
        raise NoStep(f"{pad} padded frames for a window that reaches over {span} are windows of padding alone")
    delay = max(times.least, times.delay + (span - pad) * times.period)
    made = Timed(Place(place.axis), times.period * step, delay)
    result = known.example(node)[1]
    several = tuple([made] + [None] * (len(result) - 1)) if isinstance(result, list | tuple) else made
    call = known._call(node, *known.lengths[source])
    return Slid(
        call,
        known.source(source, stride=step, first=-pad),
        left=pad, right=pad, span=span, on_window=on_window, blank_value=blank_value, times=several,
    )  # fmt: skip


def _pool(known: Analysis, node: fx.Node) -> Rule | None:
    source, times, place = timed_input(known, node)
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    dims = int(name.split("pool")[1][0])
    first = known.example(source)[1].ndim - dims
    at = place.axis - first
    if at < 0:
        return None
    kernel = each(node.args[1], dims)
    stride = each(arg(node, 2, "stride") or kernel, dims)
    pads = each(arg(node, 3, "padding", 0), dims)
    is_max = name.startswith("max")
    dilation = each(arg(node, 4, "dilation", 1), dims) if is_max else [1] * dims
    ceil = arg(node, 5 if is_max else 4, "ceil_mode", False)
    counts, divisor = (True, None) if is_max else (arg(node, 5, "count_include_pad", True), arg(node, 6, "", None))
    alone_at(place, place.axis, "the pooling")
    span, step, pad = (kernel[at] - 1) * dilation[at], stride[at], pads[at]
    if ceil and (step > 1 or span > 0):
        raise NoStep("ceil_mode=True along time makes the last window depend on where the clip ends; leave it out")
    if pad and not counts:
        raise NoStep("count_include_pad=False with padding along time divides by what is inside; pad nothing there")
    inner = [0 if n == at else p for n, p in enumerate(pads)]
    target = node.target
    rest = [dilation, ceil] if is_max else [ceil, counts, *([divisor] if dims > 1 else [])]

    def on_window(window: Any, value_of: Callable[[fx.Node], Any]) -> Any:
        return target(window, kernel, stride, inner, *rest)  # type: ignore[operator]

    return _slid(known, node, source, times, place, (span, step, pad), on_window, float("-inf") if is_max else 0.0)


def _reduction(kind: str) -> Callable[[Analysis, fx.Node], Rule | None]:
    def make(known: Analysis, node: fx.Node) -> Rule | None:
        source, times, place = timed_input(known, node)
        ndim = known.example(source)[1].ndim
        dims = arg(node, 1, "dim")
        dims = list(range(ndim)) if not dims and dims != 0 else [d % ndim for d in each(dims, 1)]
        if place.axis not in dims:
            return None
        alone_at(place, place.axis, "the reduction")
        return so_far(known, node, source, times, kind)

    return make


def _adaptive(kind: str) -> Callable[[Analysis, fx.Node], Rule | None]:
    def make(known: Analysis, node: fx.Node) -> Rule | None:
        source, times, place = timed_input(known, node)
        sizes = list(node.args[1])  # type: ignore[arg-type]
        at = place.axis - (known.example(source)[1].ndim - len(sizes))
        if at < 0 or list(known.twins.shorter[node].args[1])[at] != sizes[at]:  # type: ignore[arg-type]
            return None
        if sizes[at] != 1:
            raise NoStep(f"it divides the clip into {sizes[at]} parts, whatever its length")
        alone_at(place, place.axis, "the pooling")
        return so_far(known, node, source, times, kind)

    return make


def _recurrent(known: Analysis, node: fx.Node) -> Rule | None:
    source, times, place = timed_input(known, node)
    only_timed(known, node, source)
    is_batch_first, is_both = bool(node.args[8]), bool(node.args[7])
    if place.axis != (1 if is_batch_first else 0):
        return None
    alone_at(place, place.axis, "the recurrent layer")
    if is_both:
        raise NoStep("it goes through the clip backwards, too (bidirectional=True)")
    delay = max(times.least, times.delay)
    running = Timed(None, times.period, delay, times.limit)
    count = len(known.example(node)[1])
    call = known._call(node, *known.lengths[source])
    made = (Timed(place, times.period, delay, times.limit), *(running for _ in range(count - 1)))
    return Recurrent(call, known.source(source), made)


TEMPORAL: dict[str, Callable[[Any, fx.Node], Rule | None]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **{f"{kind}_pool{n}d": _pool for kind in ("max", "avg") for n in (1, 2, 3)},
    **{f"max_pool{n}d_with_indices": _pool for n in (2, 3)},
    **{f"adaptive_avg_pool{n}d": _adaptive("mean") for n in (1, 2, 3)},
    **{f"_adaptive_avg_pool{n}d": _adaptive("mean") for n in (2, 3)},
    **ALONG,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    "mean": _reduction("mean"),
    "sum": _reduction("sum"),
    "amax": _reduction("max"),
}
"""Operations that can mix frames -> what makes their rule."""
