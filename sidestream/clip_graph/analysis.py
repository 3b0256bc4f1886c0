"""Every operation of a clip's graph with its rule on streams, or a refusal that names the place.

What an operation does to time is declared for those that mix frames (``temporal``). Every other one is tried: where
it makes of each frame alone what it makes of it among others, it works frame by frame (``alone``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sidestream.clip_graph.alone import works_alone
from sidestream.clip_graph.arguments import NoStep
from sidestream.clip_graph.exported import Call, Twins, where
from sidestream.clip_graph.place import Place
from sidestream.clip_graph.rules import Fixed, FrameByFrame, Part, Rule, Source, Timed
from sidestream.clip_graph.temporal import TEMPORAL
from sidestream.errors import ModelError

VIEWS = frozenset((
    "view", "slice", "transpose", "permute", "unsqueeze", "squeeze", "expand", "select", "split", "split_with_sizes",
    "chunk", "unbind", "t", "alias", "detach", "narrow", "movedim", "unflatten", "numpy_T", "view_as", "expand_as",
))  # fmt: skip
"""Operations that move no number."""
OFFER = "SlidingWindow(model, num_frames) reads the newest frames again for each answer"


@dataclass
class Analysis:
    """What is known of each node: a rule for what comes frame by frame, ``Fixed`` for the rest."""

    twins: Twins
    input_node: fx.Node
    place: Place
    newest: int | None
    num: int
    """Frames of the clip."""
    longer_num: int
    device: torch.device
    times: dict[fx.Node, Any] = field(default_factory=dict)
    """``Timed`` or ``Fixed``; of a node with several results a tuple of ``Timed`` or None."""
    rules: dict[fx.Node, Rule] = field(default_factory=dict)
    calls: dict[fx.Node, Call] = field(default_factory=dict)
    """Of what is made of weights alone."""
    lengths: dict[fx.Node, tuple[int, int]] = field(default_factory=dict)
    """Frames of what comes frame by frame, of the clip and of the longer one."""

    def run(self, model_name: str) -> None:
        """Find all. ModelError with the place of what has no step form."""
        for node in self.twins.module.graph.nodes:
            try:
                self._node(node)
            except NoStep as reason:
                raise ModelError(f"{model_name} has no exact step form at {where(node)}: {reason}; {OFFER}") from None

    def answer_times(self, model_name: str) -> Timed:
        """When the model's answer comes. ModelError for an answer that is none of a stream."""
        answer = self.twins.module.graph.output_node().args[0]
        assert isinstance(answer, fx.Node)
        times = self.times[answer]
        if not isinstance(times, Timed):
            raise ModelError(f"the answer of {model_name} does not depend on the clip, at {where(answer)}; {OFFER}")
        if times.place is not None and times.place.axis > 0 and not times.place.is_alone:
            raise ModelError(
                f"{model_name} answers with several values for each frame along one axis, at {where(answer)}: give "
                f"them an axis of their own; {OFFER}"
            )
        if times.limit is not None:
            raise ModelError(f"the answer of {model_name} is about the first {times.limit} frames only; {OFFER}")
        return times

    def _node(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.times[node] = Timed(self.place, 1, 0)
            self.lengths[node] = (self.num, self.longer_num)
        elif node.op == "get_attr":
            owner, _, key = str(node.target).rpartition(".")
            self.times[node] = Fixed(False, getattr(self.twins.module.get_submodule(owner), key))
        elif node.op == "call_function":
            timed = [n for n in node.all_input_nodes if not isinstance(self.times[n], Fixed)]
            if timed and _name(node) in ("new_full", "new_zeros", "new_ones"):
                self._made_like(node)
            elif timed:
                self._timed(node, timed)
            else:
                self._fixed(node)
        elif node.op != "output":
            raise NoStep(f"{node.op} of {node.target!r} is not understood")

    def _fixed(self, node: fx.Node) -> None:
        call = self._call(node, self.num, self.longer_num)
        inherits = any(self.times[n].depends_on_length for n in node.all_input_nodes)
        with torch.no_grad():
            value = call(lambda n: self.times[n].value, self.longer_num)
        self.calls[node] = call
        self.times[node] = Fixed(call.depends_on_length or inherits, value)

    def _made_like(self, node: fx.Node) -> None:
        """A constant that takes nothing but type and device from a frame."""
        like = node.args[0]
        assert isinstance(like, fx.Node)
        call = self._call(node, self.num, self.longer_num)
        made = self.example(like)[1]
        call.args[0] = torch.empty(0, dtype=made.dtype, device=self.device)
        self.calls[node] = call
        self.times[node] = Fixed(call.depends_on_length, call(self.times.__getitem__, self.longer_num))

    def _call(self, node: fx.Node, num: int, longer_num: int) -> Call:
        try:
            return Call(node, self.twins.shorter[node], num, longer_num)
        except ValueError as error:
            raise NoStep(f"it depends on the number of frames in a way that is not understood ({error})") from None

    def _timed(self, node: fx.Node, timed: list[fx.Node]) -> None:
        if getattr(node.target, "__name__", "") == "getitem":
            self._part(node, timed[0])
            return
        for n in timed:
            if not isinstance(self.times[n], Timed):
                raise NoStep("it takes several results as one")
        rule = None
        make = TEMPORAL.get(_name(node))
        if make is not None and self.times[timed[0]].place is not None:
            try:
                rule = make(self, node)
            except ValueError as error:
                raise NoStep(f"a bound depends on the number of frames in another way ({error})") from None
        if rule is None:
            rule = self._frame_by_frame(node, timed)
        self._keep(node, rule)

    def _keep(self, node: fx.Node, rule: Rule) -> None:
        self.rules[node], self.times[node] = rule, rule.times
        short, long = ([self.lengths[s.node][k] for s in rule.sources] for k in (0, 1))
        self.lengths[node] = (rule.length(short), rule.length(long))

    def _part(self, node: fx.Node, whole: fx.Node) -> None:
        index = node.args[1]
        times = self.times[whole]
        if not isinstance(times, tuple) or not isinstance(index, int) or times[index] is None:
            raise NoStep("this part of the result has no frames")
        self._keep(node, Part(Source(whole, times[index]), index))

    def _frame_by_frame(self, node: fx.Node, timed: list[fx.Node]) -> Rule:
        times = [self.times[n] for n in timed]
        if len({t.place is None for t in times}) > 1:
            raise NoStep("an answer about all of the clip meets single frames (squeeze-and-excitation over the clip)")
        limits = {t.limit for t in times}
        if len(limits) > 1:
            raise NoStep("the first frames of a stream meet all of it")
        sources = self._at_one_rate(timed, times)
        period = max(t.period for t in times)
        is_view = len(sources) == 1 and _name(node) in VIEWS
        delay = max(s.times.delay + s.first * s.times.period for s in sources)
        least = max(t.least for t in times)
        delay = delay if is_view else max(least, delay)
        num, longer_num = self.lengths[timed[0]]
        call = self._call(node, num, longer_num)
        found, constant = works_alone(self, node, call, timed)

        def timed_of(place: Any) -> Timed | None:
            return None if place == "no frames" else Timed(place, period, delay, times[0].limit, least)

        result: Any = tuple(map(timed_of, found)) if isinstance(found, list) else timed_of(found)
        return FrameByFrame(call, sources, result, constant, is_view=is_view)

    def _at_one_rate(self, nodes: list[fx.Node], times: list[Timed]) -> list[Source]:
        """The inputs of an operation, frame by frame; answers about all so far may come at several rates."""
        period = max(t.period for t in times)
        slowest = {self.lengths[n] for n, t in zip(nodes, times) if t.period == period}
        if all(t.place is None and period % t.period == 0 for t in times) and len(slowest) == 1:
            steps = [period // t.period for t in times]
            return [Source(n, t, step, step - 1) for n, t, step in zip(nodes, times, steps)]
        if len({t.period for t in times}) > 1 or len({self.lengths[n] for n in nodes}) > 1:
            raise NoStep("it joins what comes at different rates, or in different numbers of frames")
        return [Source(n, t) for n, t in zip(nodes, times)]

    def example(self, node: fx.Node) -> tuple[Any, Any]:
        """What a node makes of the clip and of the longer one, as tensors without memory."""
        return self.twins.shapes[node]

    def source(self, node: fx.Node, **reads: int) -> Source:
        return Source(node, self.times[node], **reads)


def _name(node: fx.Node) -> str:
    """Of an aten operation, without its overload."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else ""
