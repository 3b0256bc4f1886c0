"""Whether the stages in a row are the model: both run on examples that the cut has not seen, several in a row.

What a graph cannot show comes out here: state that forward keeps in attributes, paths that are taken only while a
model is traced, values that were frozen. Each difference is refused with the first stage and node that differ.

What it costs (``check=``): "full": the model once to warm up, then ``NUM_PROBES`` times, and the stages as often;
of a model slower than ``SLOW_SECONDS`` a frame one less each. "once": one frame each. "off": nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from sidestream.circuit.calls import Stream, called, copied, perturbed
from sidestream.circuit.memory import Snapshot, is_of_hook, other_weights
from sidestream.circuit.poison import Poison
from sidestream.circuit.same import same, same_leaf
from sidestream.circuit.undo import NUMPYS, PYTHONS
from sidestream.circuit.watch import GradientSwitches, watching_parameters
from sidestream.errors import CutError

NUM_PROBES = 3
NUM_SEEDS = 8
"""Of Python's generator, where a model in eval mode draws from it."""
SLOW_SECONDS = 0.5


@dataclass
class Verifier:
    """The plain model's answers to probes, from the state that the model has, and what it changed meanwhile."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    before: Snapshot
    how: str
    warm: Snapshot | None = None
    """After a call, where a call fills in attributes once and for all."""
    filled_in: tuple[str, ...] = ()
    """Attributes that a first call fills in."""
    keeps_weights: bool = False
    """What a first call fills in is made of the weights."""
    written_buffers: set[str] = field(default_factory=set)
    """Names of the buffers that a call changes."""
    steers_gradients: bool = False
    """It turns gradients on or off inside, which a graph that is traced without gradients does not show."""
    probes: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    expected: list[Any] = field(default_factory=list)
    _scratch: set[str] = field(default_factory=set)
    stream: Stream | None = None
    """For a model that runs as a stream of frames with a state: how it is called."""

    @property
    def moving(self) -> frozenset[str]:
        """Attributes that forward assigns, though they are no state."""
        paths = (*self.filled_in, *self._scratch)
        return frozenset(path.removeprefix("len(").removeprefix("order of ").rstrip(")") for path in paths)

    def look(self) -> None:
        """Run the plain model. Raises CutError where it fails, or keeps state that no buffer holds."""
        if self.how == "off":
            return
        started = time.perf_counter()
        switches = GradientSwitches()
        try:
            with watching_parameters(self.model):
                self._call((self.args, self.kwargs), watch=switches)
        except CutError as error:
            if not isinstance(error.__cause__, NotImplementedError):
                raise
            self._restart()  # an operator of higher order, which cannot be watched
            self._call((self.args, self.kwargs), watch=switches)
        self.steers_gradients = switches.was_used and not self.model.training
        seconds = time.perf_counter() - started
        warm = Snapshot(self.model)
        self.filled_in = tuple(p for p in self.before.changed(warm) if p not in (PYTHONS, NUMPYS))
        self.warm = warm if self.filled_in else None
        self.keeps_weights = self._keeps_weights()
        self._restart()
        self._run_probes(1 if self.how == "once" else NUM_PROBES - (seconds > SLOW_SECONDS))
        self._restart()

    def _keeps_weights(self) -> bool:
        """Whether what a first call filled in is made of the weights: with others, the answer then depends on it."""
        if self.model.training or not (self.warm or self.before.has_new_cache_entries()):
            return False
        try:
            with other_weights(self.model):
                self._put_buffers_back()
                kept = pytree.tree_map(copied, self._call((self.args, self.kwargs)))
                self._restart()
                self._call((self.args, self.kwargs))
                self._put_buffers_back()
                fresh = pytree.tree_map(copied, self._call((self.args, self.kwargs)))
            return not same(kept, fresh)
        except CutError:
            return True
        finally:
            self._restart()

    def _run_probes(self, num_probes: int) -> None:
        snapshots: list[Snapshot] = []
        for number in range(num_probes):
            probe = (self.args, self.kwargs) if number == 1 else self._perturbed(number)
            try:
                with torch.inference_mode(not self.model.training):
                    answer = self._call(probe)
            except CutError:  # it is no input for this model (an index out of range, say); the example is
                (snapshots[-1] if snapshots else self.before).restore()
                probe = (self.args, self.kwargs)
                answer = self._call(probe)
            self.probes.append(probe)
            self.expected.append(pytree.tree_map(copied, answer))
            snapshots.append(Snapshot(self.model))
            self.written_buffers.update((snapshots[-2] if number else self.before).changed_buffers(snapshots[-1]))
            if len(snapshots) > 1:
                self._check_attributes(self._news(*snapshots[-2:]), snapshots[-1])
        if num_probes == 1 and self.warm is not None:
            self._call(self._perturbed(7))
            latest = Snapshot(self.model)
            self._check_attributes(self._news(snapshots[0], latest), latest)

    def _news(self, earlier: Snapshot, later: Snapshot) -> list[str]:
        """What changed, and was not yet found to be scratch."""
        changed = [path for path in earlier.changed(later) if path not in self._scratch]
        return [path for path in changed if not is_of_hook(path)] if self.stream else changed  # whose hooks are called

    def _call(self, probe: tuple[tuple[Any, ...], dict[str, Any]], watch: Any = None) -> Any:
        call = self.stream or self.model
        return called(self.model, *probe, records=self.model.training, watch=watch, call=call)

    def _restart(self) -> None:
        """Back to the state that the model has."""
        self.before.restore()
        self.before.forget_new_cache_entries()
        if self.stream is not None:
            self.stream.state = None

    def _perturbed(self, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return perturbed((self.args, self.kwargs), seed=number)

    def _check_attributes(self, changed: list[str], latest: Snapshot) -> None:
        """CutError for an attribute that changed from one frame to the next, unless its old value is never used."""
        if not changed or self._is_scratch(changed, latest):
            self._scratch.update(changed)
            return
        if drawn := [path for path in changed if path in (PYTHONS, NUMPYS)]:
            raise CutError(
                f"{type(self.model).__name__} draws random numbers from {drawn[0]}, whose order no graph shows; draw "
                "them with torch (torch.rand), or cut a model that draws none"
            )
        more = f" (and {', '.join(map(repr, changed[1:4]))})" if len(changed) > 1 else ""
        raise CutError(
            f"{type(self.model).__name__} keeps state outside of its buffers: its forward changes "
            f"{changed[0]!r}{more} on every frame, which stages would not share; register it as a buffer "
            "(self.register_buffer), write the model as streaming layers, or do not assign it in forward"
        )

    def _is_scratch(self, changed: list[str], latest: Snapshot) -> bool:
        """Whether forward writes to these places before it reads them: it answers the same without the old values."""
        drawn = [path for path in changed if path in (PYTHONS, NUMPYS)]
        if drawn and (self.model.training or not self._draws_for_nothing(latest)):
            return False
        changed = [path for path in changed if path not in drawn]
        if any(path not in latest.places for path in changed):
            return False
        probe = self._perturbed(7)
        state = self.stream.state if self.stream else None
        try:
            expected = pytree.tree_map(copied, self._call(probe))
            latest.restore()
            if self.stream is not None:
                self.stream.state = state
            for path in changed:
                table, key = latest.places[path]
                table[key] = Poison()
            return same(pytree.tree_map(copied, self._call(probe)), expected)
        except CutError:
            return False
        finally:
            latest.restore()
            if self.stream is not None:
                self.stream.state = state

    def _draws_for_nothing(self, latest: Snapshot) -> bool:
        """Whether the answer is the same whatever the generators of Python and numpy draw."""
        answers = []
        state = self.stream.state if self.stream else None
        try:
            for seed in range(NUM_SEEDS):
                random.seed(seed)
                np.random.seed(seed)
                answers.append(pytree.tree_map(copied, self._call(self._perturbed(7))))
                latest.restore()
                if self.stream is not None:
                    self.stream.state = state
        finally:
            latest.restore()
        return all(same(answer, answers[0]) for answer in answers)

    def ready_to_trace(self) -> None:
        """Attributes that the first call fills in are filled in, buffers are as they were."""
        if self.warm is not None:
            self.warm.restore()
        self._put_buffers_back()

    def _put_buffers_back(self) -> None:
        if self.stream is not None:
            self.stream.state = None
        buffers = dict(self.model.named_buffers())
        for name, value in self.before.buffers.items():
            if value is not None and name in buffers and not same_leaf(buffers[name], value):
                with torch.no_grad():
                    buffers[name].copy_(value)

    def compare(self, run: Callable[..., Iterator[Any]], where: Callable[[Any], str]) -> None:
        """The stages against the model. ``run(probes)`` gives their answers; ``where(probe)`` finds the difference."""
        self._restart()
        for number, (given, wanted) in enumerate(zip(run(self.probes), self.expected)):
            if not same(pytree.tree_map(copied, given), wanted):
                raise CutError(self._refusal(number, where(self.probes[number])))

    def _refusal(self, number: int, where: str) -> str:
        frame = "a frame" if number == 0 else f"frame {number + 1} in a row"
        remedy = (
            "forward takes another path while it is traced, or code that the graph does not show depends on values or "
            "on earlier frames"
        )
        if self.filled_in:
            remedy = f"forward assigns {', '.join(map(repr, self.filled_in[:3]))}: make it a buffer"
        elif not self._repeats(number):
            remedy = "the model itself does not answer the same frame twice alike"
        return (
            f"the stages do not give what {type(self.model).__name__} gives on {frame} like the example, first at "
            f"{where}; {remedy}; or keep the module around it whole: cut(model, example, cut=('its.dotted.name', ...))"
        )

    def _repeats(self, number: int) -> bool:
        """Whether the model gives the same answers when it is asked again from the same state."""
        self._restart()
        for probe, wanted in list(zip(self.probes, self.expected))[: number + 1]:
            with torch.inference_mode(not self.model.training):
                again = self._call(probe)
            if not same(pytree.tree_map(copied, again), wanted):
                return False
        return True
