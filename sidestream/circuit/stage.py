"""A stage: one part of a model, cut by depth. ``(inputs, state) -> (outputs, state)``, and nothing hidden.

A model that was cut is ``Stages``: its stages in order of depth, and ``links`` that say which output of which
stage is which input of which later one. Links carry no time; a wiring (``circuit.wiring``) gives every link a
delay and so makes a ``Circuit``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sidestream.circuit.gate import ONE_CUT
from sidestream.circuit.same import same_leaf
from sidestream.errors import CircuitError, LayoutError
from sidestream.types import NOTHING as NOTHING  # a legal output of any stage

Values = tuple[Any, ...]
"""Flat values, one per input or output of a stage; mostly tensors."""
State = Any
"""Whatever a stage carries from one tick to the next; None for a stage without memory."""
SOURCE = 0
"""The number of the frame source; stages are numbered 1..K, the sink (the circuit's answer) is K + 1."""


@dataclass(frozen=True)
class Stage:
    """One stage of a circuit.

    ``step(inputs, state) -> (outputs, state)`` takes ``num_inputs`` flat values and gives ``num_outputs``.
    It must not change its inputs or the state it was given: an old state stays valid.
    """

    name: str
    step: Callable[[Values, State], tuple[Values, State]] = field(repr=False)
    num_inputs: int
    num_outputs: int
    init_state: Callable[[], State] | None = field(default=None, repr=False)
    """Makes the state of a new stream; None when the stage has no memory."""
    finish: Callable[[State], Sequence[Values]] | None = field(default=None, repr=False)
    """The outputs that a stage with look-ahead still owes when the stream ends, in order."""
    delay_ticks: int = 0
    """Frames by which the outputs come later than the frame they belong to, layers before this stage included."""
    period_ticks: int = 1
    """Ticks from one output to the next where layers swallow frames, layers before this stage included."""
    input_period_ticks: int = 1
    """Ticks from one input to the next: the temporal strides of the layers before this stage."""
    cost_seconds: float | None = None
    """Measured time of one step on one thread (the least of a few runs, warm), where known; of a step that answers,
    or, in a stage in which parts answer less often than others, of the mean step."""
    unit_costs: tuple[float, ...] | None = field(default=None, repr=False)
    """What each node, or layer kept whole, counted for when the boundaries were chosen, where known."""
    output_bytes: tuple[int, ...] | None = None
    """Size of each output for the example, where known: what a register on its wire costs."""
    hides_state: bool = False
    """``step`` writes to buffers of the module (a batch norm in train mode, a model that counts): frames must come in
    order and once, and the stage cannot be converted."""
    init_buffers: Callable[[], State] | None = field(default=None, repr=False)
    """Where it hides a state: makes the state of a new stream, copies of these buffers as they are now. Given None
    instead, ``step`` works on the module's own buffers (in training); trying out a stage without it changes them."""
    calls_modules: bool = True
    """``step`` calls modules of the model, which must not be traced meanwhile; a graph of operators calls none."""
    draws: bool = False
    """``step`` draws random numbers, whose order is part of the answer."""
    module: Any = field(default=None, repr=False)
    """The ``nn.Module`` behind ``step`` where there is one (back ends export it; training reads its parameters)."""
    example_inputs: Values | None = field(default=None, repr=False)
    """Flat inputs with which the stage was made, where known (back ends need their shapes)."""
    copy: Callable[[], Stage] | None = field(default=None, repr=False)
    """Makes a twin that another thread can run at the same time; None when ``step`` itself is thread-safe."""
    guard: Callable[[], None] | None = field(default=None, repr=False)
    """Called at the start of each run: takes over weights that were replaced in the model, and raises CircuitError
    where the model is no longer what was cut."""
    backend: str = "eager"

    @property
    def is_stateful(self) -> bool:
        return self.init_state is not None or self.hides_state

    def begin(self, *, trains: bool = False) -> State:
        """The state of a new stream, once its ``guard`` agrees. ``trains``: buffers are the model's own."""
        with ONE_CUT:  # a model that is being cut is not itself
            return self._begun(trains)

    def _begun(self, trains: bool) -> State:
        if self.guard is not None:
            self.guard()
        if self.init_buffers is not None and not trains:
            return self.init_buffers()
        return self.init_state() if self.init_state is not None else None

    def twin(self) -> Stage:
        """A stage that may run at the same time as this one (itself where that is safe)."""
        return self if self.copy is None else self.copy()


@dataclass(frozen=True, order=True)
class Link:
    """Output ``output`` of stage ``source`` is input ``input`` of stage ``target``."""

    source: int
    output: int
    target: int
    input: int


@dataclass(frozen=True)
class Stages:
    """A model cut by depth: stages in order, links between them, and the model's own calling convention."""

    stages: tuple[Stage, ...]
    links: tuple[Link, ...]
    in_spec: pytree.TreeSpec
    """Structure of ``(args, kwargs)`` of the model; its leaves are the outputs of the source."""
    out_spec: pytree.TreeSpec
    """Structure of what the model returns; its leaves are the inputs of the sink."""
    name: str = "model"
    input_spec: Any = None
    """``types.InputSpec`` of the model, where known."""
    example: tuple[Any, dict[str, Any]] | None = field(default=None, repr=False)
    """``(args, kwargs)`` with which the model was cut, where known."""

    def __post_init__(self) -> None:
        check_links(self.stages, self.links, self.in_spec.num_leaves, self.out_spec.num_leaves)

    def __len__(self) -> int:
        return len(self.stages)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def __getitem__(self, i: int) -> Stage:
        return self.stages[i]

    @property
    def is_stateful(self) -> bool:
        return any(s.is_stateful for s in self.stages)

    def with_stages(self, stages: tuple[Stage, ...]) -> Stages:
        """The same links over other stages (a back end's, say)."""
        return replace(self, stages=tuple(stages))

    def init_state(self) -> list[State]:
        """One state per stage, as at the start of a stream."""
        return [s.begin() for s in self.stages]

    def step(self, state: list[State], *args: Any, **kwargs: Any) -> tuple[Any, list[State]]:
        """One frame through all stages in a row: ``(answer, new state)``. The slow twin of every wiring."""
        K = len(self.stages)
        values: dict[tuple[int, int], Any] = {
            (SOURCE, n): leaf for n, leaf in enumerate(flatten_inputs(self.in_spec, args, kwargs, self.example))
        }
        new_state = list(state)
        for number, stage in enumerate(self.stages, start=1):
            outputs, new_state[number - 1] = stage.step(self.inputs_of(values, number), state[number - 1])
            values.update({(number, n): value for n, value in enumerate(outputs)})
        return pytree.tree_unflatten(self.inputs_of(values, K + 1), self.out_spec), new_state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The stages in a row on fresh state: equals the model, to the bit."""
        return self.step(self.init_state(), *args, **kwargs)[0]

    def inputs_of(self, values: Mapping[tuple[int, int], Any], target: int) -> Values:
        """What stage ``target`` is given (K + 1: the leaves of the answer), of ``values`` by stage and output."""
        links = sorted((k for k in self.links if k.target == target), key=lambda k: k.input)
        return tuple(values[k.source, k.output] for k in links)


def flatten_inputs(
    in_spec: pytree.TreeSpec,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    example: Any = None,
    *,
    copies: bool = False,
) -> list[Any]:
    """Leaves of a call, refused when its structure is not the one the model was cut with.

    With ``example``, the ``(args, kwargs)`` of the cut, also refused when a number, flag or text in it differs:
    those are part of the traced model. Tensors are laid out in memory like the example's. (Their shapes and types are
    checked by the stages that read them.) ``copies``: all tensors are copied, so that the caller may reuse them.
    """
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    if spec != in_spec:
        raise LayoutError(
            f"the model was cut for inputs of the structure {_in_line(in_spec)}, but was given {_in_line(spec)}; "
            "call it with the same arguments, in the same order, as the example"
        )
    return like_example(leaves, example, copies=copies)


def _in_line(spec: pytree.TreeSpec) -> str:
    return " ".join(str(spec).split())


def like_example(leaves: Sequence[Any], example: Any = None, *, copies: bool = False) -> list[Any]:
    """Leaves of a call that has the right structure: see ``flatten_inputs``."""
    if example is None:
        return [strided_copy(leaf) if copies and isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return [_like(leaf, model, copies) for leaf, model in zip(leaves, pytree.tree_leaves(example), strict=True)]


def _like(given: Any, example: Any, copies: bool) -> Any:
    """One leaf as the model was cut for it."""
    if not isinstance(example, Tensor):
        if not same_leaf(given, example):
            raise LayoutError(f"the model was cut with the argument {example!r}, but was given {given!r}; cut it anew")
        return given
    if not isinstance(given, Tensor):
        raise LayoutError(f"the model was cut for a tensor of shape {tuple(example.shape)}, but was given {given!r}")
    if example is given and not copies:
        return given
    if (
        given.layout is torch.strided
        and given.shape == example.shape
        and given.stride() != (wanted := strides_of(example))
    ):
        return torch.empty_strided(given.shape, wanted, dtype=given.dtype, device=given.device).copy_(given)
    return strided_copy(given) if copies else given


def strided_copy(tensor: Tensor) -> Tensor:
    """A copy with the same strides, also of a tensor that lies in memory with gaps."""
    copy = tensor.clone()
    if tensor.layout is not torch.strided or copy.stride() == (wanted := strides_of(tensor)):
        return copy
    return torch.empty_strided(tensor.shape, wanted, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def strides_of(example: Tensor) -> tuple[int, ...]:
    """How frames like the example lie in memory: as it does, but for one that is expanded, which is filled in."""
    if any(stride == 0 and size > 1 for size, stride in zip(example.shape, example.stride())):
        return torch.empty(example.shape, device="meta").stride()
    return example.stride()


def check_links(stages: tuple[Stage, ...], links: tuple[Link, ...], num_sources: int, num_sinks: int) -> None:
    """Every input of every stage and of the sink has exactly one link, and no link leads nowhere."""
    K = len(stages)
    num_outputs = [num_sources] + [s.num_outputs for s in stages]
    num_inputs = {n: s.num_inputs for n, s in enumerate(stages, start=1)} | {K + 1: num_sinks}
    seen: set[tuple[int, int]] = set()
    for link in links:
        if not (0 <= link.source <= K and 0 <= link.output < num_outputs[link.source]):
            raise CircuitError(f"{link} reads an output that does not exist (there are {K} stages)")
        if link.target not in num_inputs or not 0 <= link.input < num_inputs[link.target]:
            raise CircuitError(f"{link} feeds an input that does not exist (there are {K} stages)")
        if (link.target, link.input) in seen:
            raise CircuitError(f"input {link.input} of stage {link.target} is fed twice")
        seen.add((link.target, link.input))
    for target, count in num_inputs.items():
        for n in range(count):
            if (target, n) not in seen:
                what = "the answer" if target == K + 1 else f"stage {target} ({stages[target - 1].name})"
                raise CircuitError(f"input {n} of {what} is fed by no link")
