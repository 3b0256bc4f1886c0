"""The graph of a clip model, and that of the same model on more frames: what differs depends on their number.

A graph fixes every number that it was traced with, so ``x[:, :-1]``, ``x[:, :15]`` and ``x[:, : T - 1]`` may look
alike. Two graphs of different lengths tell them apart.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sidestream.circuit.trace import one_line, place_of, quiet
from sidestream.errors import ModelError

Value = Any
_OPEN_END = 2**62
"""Slices without an end have one beyond this."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """A number that is ``factor`` times the number of frames."""

    factor: int


@dataclass(frozen=True, slots=True)
class Back:
    """A number that is ``frames`` less than the number of frames."""

    frames: int


@dataclass(frozen=True)
class Twins:
    """A clip model's graph for a clip and for a longer one, node by node the same."""

    module: fx.GraphModule
    """The graph of the longer clip."""
    shapes: dict[fx.Node, tuple[Any, Any]]
    """Of each node of ``module``: what it makes of the clip and of the longer one, as tensors without memory."""
    shorter: dict[fx.Node, fx.Node]
    """Each node's twin in the graph of the clip."""

    def arguments(self, node: fx.Node) -> list[tuple[Any, Any]]:
        """Each argument as given for the clip and for the longer one."""
        return list(zip(self.shorter[node].args, node.args, strict=True))


def twins(model: nn.Module, clip: Tensor, longer: Tensor) -> Twins | str:
    """Both graphs; why there is none for the longer clip, in words, where the model takes its own length only.

    ModelError where the model cannot be traced at all, or computes other things for another number of frames.
    """
    first = _graph(model, clip)
    try:
        second = _graph(model, longer)
    except ModelError as error:
        return str(error)
    ours, theirs = list(first.graph.nodes), list(second.graph.nodes)
    if len(ours) != len(theirs):
        raise ModelError(
            f"{type(model).__name__} computes more for more frames ({len(ours)} and {len(theirs)} operations), as a "
            "loop over frames does; write it with operations over the whole clip"
        )
    for a, b in zip(ours, theirs):
        if a.op != b.op or (a.op != "placeholder" and a.target != b.target):
            raise ModelError(
                f"{type(model).__name__} computes other things for another number of frames: {where(b)} is no twin of "
                f"{where(a)}; write the model without branches on the number of frames"
            )
    made = {b: (a.meta.get("val"), b.meta.get("val")) for a, b in zip(ours, theirs)}
    return Twins(second, made, dict(zip(theirs, ours)))


def _graph(model: nn.Module, clip: Tensor) -> fx.GraphModule:
    try:
        with torch.no_grad(), quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, (clip,), strict=False).run_decompositions({})
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be traced on {tuple(clip.shape)} at {place_of(error)}: {one_line(error)}"
        ) from error
    if written := list(program.graph_signature.buffers_to_mutate.values()):
        raise ModelError(
            f"{type(model).__name__} writes to its buffer {written[0]!r} when it is called; a stream has no calls "
            "per clip: leave that out of forward"
        )
    module = program.module(check_guards=False)
    _, spec = pytree.tree_flatten(((clip,), {}))
    if program.call_spec.in_spec != spec:
        raise ModelError(f"{type(model).__name__} takes other arguments than one clip; wrap it in a module that does")
    module.graph.set_codegen(fx.graph.CodeGen())
    answers = [leaf for leaf in pytree.tree_leaves(module.graph.output_node().args[0]) if isinstance(leaf, fx.Node)]
    if len(answers) != 1:
        raise ModelError(
            f"{type(model).__name__} answers with {len(answers)} tensors; a stream has one answer per step: wrap it in "
            "a module that gives one"
        )
    with module.graph.inserting_before(module.graph.output_node()):
        module.graph.output_node().args = (answers[0],)
    module.graph.eliminate_dead_code()
    return module


def number(short: Any, long: Any, num: int, longer_num: int) -> Any:
    """A number of the graph as it follows from the number of frames: itself, ``Scaled`` or ``Back``.

    ValueError where it depends on it in another way.
    """
    if short == long:
        return long
    if type(short) is int and type(long) is int:
        if short * longer_num == long * num and short % num == 0:
            return Scaled(short // num)
        if num - short == longer_num - long:
            return Back(num - short)
    raise ValueError(f"{short!r} for {num} frames, {long!r} for {longer_num}")


def bound(short: Any, long: Any, num: int, longer_num: int, *, is_end: bool) -> int | Back:
    """A bound of a slice along time: frames from the start, or ``Back`` from the end. ValueError for another."""
    if long is None or (type(long) is int and long >= _OPEN_END):
        return Back(0) if is_end else 0
    if short == long and long < 0:
        return Back(-long)
    if short == long and short >= num and long >= longer_num:
        return Back(0)
    what = number(short, long, num, longer_num)
    if isinstance(what, Scaled):
        if what.factor != 1:
            raise ValueError(f"a bound at {what.factor} times the number of frames")
        return Back(0)
    return what


def _copied(into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(into.dtype).expand_as(into)


_IN_ITS_PLACE: dict[Any, Callable[..., Value]] = {
    torch.ops.aten.copy.default: _copied,  # has no gradient
    torch.ops.aten.view.default: torch.reshape,  # frames lie otherwise in memory than the clip does
}


class Call:
    """An operation of the graph as a function of what its arguments are and of the number of frames."""

    def __init__(self, node: fx.Node, twin: fx.Node, num: int, longer_num: int) -> None:
        """``num``, ``longer_num``: frames of what goes in, for the clip and for the longer one. ValueError for a
        number that depends on them in an unknown way."""
        target: Any = node.target
        self.target: Callable[..., Value] = _IN_ITS_PLACE.get(target, target)
        self.args = [_entry(a, b, num, longer_num) for a, b in zip(twin.args, node.args, strict=True)]
        self.kwargs = {k: _entry(twin.kwargs[k], v, num, longer_num) for k, v in node.kwargs.items()}

    def __call__(self, value_of: Callable[[fx.Node], Value], num: int) -> Value:
        args = [_filled(entry, value_of, num) for entry in self.args]
        kwargs = {name: _filled(entry, value_of, num) for name, entry in self.kwargs.items()}
        return self.target(*args, **kwargs)

    @property
    def depends_on_length(self) -> bool:
        return _has_length([*self.args, *self.kwargs.values()])


def _entry(short: Any, long: Any, num: int, longer_num: int) -> Any:
    if isinstance(long, fx.Node):
        return long
    if isinstance(long, list | tuple):
        return [_entry(a, b, num, longer_num) for a, b in zip(short, long, strict=True)]
    if isinstance(long, slice):
        return slice(*(_entry(*pair, num, longer_num) for pair in zip(_parts(short), _parts(long))))
    return number(short, long, num, longer_num)


def _parts(s: slice) -> tuple[Any, Any, Any]:
    return s.start, s.stop, s.step


def _filled(entry: Any, value_of: Callable[[fx.Node], Value], num: int) -> Any:
    kind = type(entry)
    if kind is fx.Node:
        return value_of(entry)
    if kind is list:
        return [_filled(item, value_of, num) for item in entry]
    if kind is Scaled:
        return entry.factor * num
    return num - entry.frames if kind is Back else entry


def _has_length(entries: Sequence[Any]) -> bool:
    return any(isinstance(e, Scaled | Back) or (isinstance(e, list) and _has_length(e)) for e in entries)


def where(node: fx.Node) -> str:
    """The place of a node in words: the module, the operation, and the line of the model's code."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((p for p, _ in reversed(list(stack.values())) if p), "")
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    line = ""
    for n, text in enumerate(lines):
        if text.startswith("File ") and "/torch/nn/modules/" not in text:
            code = lines[n + 1] if n + 1 < len(lines) and not lines[n + 1].startswith("File ") else ""
            line = (
                f" ({text.split(',')[0].removeprefix('File ').strip(chr(34))}:{text.split('line ')[-1].split(',')[0]}"
            )
            line += f": {code})" if code else ")"
    name = str(node.target).removeprefix("aten.").partition(".")[0] if node.op == "call_function" else node.op
    return f"{name} in {path!r}{line}" if path else f"{name}{line}"
