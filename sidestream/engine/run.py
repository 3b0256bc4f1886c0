"""``run``: a circuit on a stream. Picks the executor, hands out the answers, keeps the books."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from sidestream.circuit.wire import Circuit
from sidestream.clock import WALL, Clock
from sidestream.engine.auto import Choice, choose
from sidestream.engine.executors.frame_parallel import frame_parallel, undelayed
from sidestream.engine.executors.inline import inline
from sidestream.engine.executors.threads import threads
from sidestream.engine.feed import Feed, Prepare
from sidestream.engine.many import EXECUTORS_OF_MANY, ManyRun, many
from sidestream.engine.modes import Modes, caller_modes
from sidestream.engine.rules.forward import Forward
from sidestream.engine.rules.training import TrainingRule
from sidestream.engine.stats import RunStats
from sidestream.engine.tick import Machine, Rule
from sidestream.errors import CircuitError, InputError
from sidestream.report.measure import num_cores
from sidestream.types import Frame, Output

EXECUTORS = ("auto", "inline", "threads", "sequential", "frame-parallel")
TRAINING_EXECUTORS = ("inline", "threads")


class Run(Iterator[Output]):
    """An iterator of answers, in the order of their frames.

    ``stop()`` ends it early, and drains; ``close()`` drops what is in flight. ``stats`` are the books, ``choice`` is
    what ``executor="auto"`` found. What the source raises comes after the answers to the frames before. Ctrl-C while
    an answer is waited for drains too under "threads" and "frame-parallel", and is raised after the last answer.
    """

    def __init__(self, outputs: Iterator[Output], feed: Feed, machines: list[Machine], stats: RunStats) -> None:
        self._outputs, self._feed, self._machines = outputs, feed, machines
        self._has_losses = machines[0].rule.goes_back
        self.stats = stats
        self.choice: Choice | None = None

    def __iter__(self) -> Run:
        return self

    def __next__(self) -> Output:
        try:
            output = next(self._outputs, None)
        except KeyboardInterrupt:
            self.close()
            raise
        finally:
            self._look_at_the_machines()
        if output is None:
            if (failure := self._feed.failure) is not None:
                self._feed.failure = None
                raise failure
            raise StopIteration
        if self._has_losses:
            answer, loss = output.value
            output = replace(output, value=answer, loss=float(loss))
        self.stats.book(output)
        return output

    def _look_at_the_machines(self) -> None:
        stages = zip(*([cell.busy_seconds for cell in m.cells] for m in self._machines), strict=True)
        self.stats.busy_seconds = tuple(map(sum, stages))
        self.stats.num_frames = self._feed.num_frames

    def stop(self) -> None:
        """Take no more frames; those in flight are still answered. Safe to call from a signal handler."""
        self._feed.stop()

    def close(self) -> None:
        """End now. Answers in flight are lost."""
        self._feed.stop()
        if hasattr(self._outputs, "close"):
            self._outputs.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def run(
    circuit: Circuit,
    frames: Iterable[Any],
    *,
    executor: str = "threads",
    rule: Rule | None = None,
    prepare: Prepare = None,
    num_threads: int | None = None,
    max_in_flight: int | None = None,
    copy_frames: bool = True,
    clock: Clock = WALL,
) -> Run:
    """Run ``circuit`` on a stream and iterate over its answers.

    ``frames``: any iterable of ``Frame``, of tensors BCHW, of tuples of inputs, or of dicts of inputs.
    ``executor``: "inline" (one thread, the oracle), "threads" (stages in parallel, each on a different frame),
    "sequential" (whole model frame by frame, the stages using all intra-op threads), "frame-parallel" (whole model
    on different frames, stateless circuits only), or "auto" (tries them for about a second and picks; see ``auto``).
    ``rule``: what a stage does in a tick; default ``Forward()``. Under a training rule (``Sideways``, ``Exact``)
    ``frames`` holds pairs ``(one of the above, target)``, answers carry their ``loss``, and the executor is "inline"
    or "threads".
    ``prepare``: ``InputSpec`` or function that turns a ``Frame`` into the model's input; default: the circuit's
    own ``input_spec``, where the model came with one.
    ``num_threads``: workers ("threads", "frame-parallel") or intra-op threads ("sequential"); default: all cores.
    ``max_in_flight``: see ``executors.threads``.
    ``copy_frames``: tensors of the stream are copied when they are taken (a copy of 224 x 224 float pixels takes some
    50 us), as a source may write the next frame into the same memory; False where it never does.

    Each run begins with the state that the model has at its start, and keeps a state of its own; autocast is that of
    the caller, on every executor. Raises CircuitError for a model that draws random numbers where their order would
    not be the model's.
    """
    if executor not in EXECUTORS:
        raise InputError(f"unknown executor {executor!r}; expected one of {', '.join(EXECUTORS)}")
    if isinstance(frames, Mapping):
        raise InputError(f"a dict of {len(frames)} streams was given to run, which takes one stream; use run_many")
    _check_threads(num_threads)
    options = _Options(rule or Forward(), prepare, num_threads or num_cores(), max_in_flight, copy_frames, clock)
    if options.rule.goes_back and executor not in TRAINING_EXECUTORS:
        raise InputError(
            f"a training rule cannot run on executor {executor!r}, which leaves out the delays or tries things out; "
            f"expected one of {', '.join(TRAINING_EXECUTORS)}"
        )
    if executor != "auto":
        return _start(circuit, frames, executor, options)
    first, frames = _peek(frames, clock)
    if first is None:
        return _start(circuit, (), "threads", options)
    choice = choose(
        circuit,
        first,
        lambda name, items: _start(circuit, _Arriving(items, frames, clock), name, options),
        frame_rate=_live_rate(frames),
    )
    started = _start(circuit, frames, choice.executor, options)
    started.choice = choice
    return started


def run_many(
    circuit: Circuit,
    streams: Mapping[str, Iterable[Any]],
    *,
    executor: str = "threads",
    prepare: Prepare = None,
    num_threads: int | None = None,
    copy_frames: bool = True,
    clock: Clock = WALL,
) -> ManyRun:
    """Run several streams through one circuit, and iterate over their answers as they come.

    ``streams``: name -> anything that ``run`` takes as ``frames``. Each stream has a state of its own and is answered
    as if it ran alone; ``Output.source`` says which it is. Weights are there once, and one pool of ``num_threads``
    workers serves all: the oldest frame goes first. A stream whose source is slow, drops out or fails does not hold up
    the others. ``executor``: "threads", or "inline" (one thread, in turn). The rest is as in ``run``.

    Raises CircuitError for stages that keep state where all streams would share it.
    """
    if executor not in EXECUTORS_OF_MANY:
        raise InputError(
            f"executor {executor!r} does not run several streams; expected one of {', '.join(EXECUTORS_OF_MANY)}"
        )
    names = list(streams)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"the streams are named {names!r}; give a dict from names (strings) to streams, one or more")
    _check_threads(num_threads)
    feeds = [Feed(frames, circuit, prepare=prepare, clock=clock, copies=copy_frames) for frames in streams.values()]
    return many(circuit, names, feeds, executor=executor, num_threads=num_threads or num_cores(), clock=clock)


def _check_threads(num_threads: int | None) -> None:
    if num_threads is not None and num_threads < 1:
        raise InputError(f"num_threads={num_threads}; expected 1 or more")


@dataclass(frozen=True)
class _Options:
    rule: Rule
    prepare: Prepare
    num_threads: int
    max_in_flight: int | None
    copy_frames: bool
    clock: Clock


def _start(circuit: Circuit, frames: Iterable[Any], executor: str, options: _Options) -> Run:
    clock, rule, num_threads = options.clock, options.rule, options.num_threads
    if executor == "sequential":
        circuit = undelayed(circuit)
    if not rule.goes_back:
        _check_draws(circuit, executor)
    feed = Feed(
        frames,
        circuit,
        prepare=options.prepare,
        clock=clock,
        has_targets=rule.goes_back,
        num_silent_ticks=rule.num_silent_ticks(circuit) if isinstance(rule, TrainingRule) else 0,
        copies=options.copy_frames,
    )
    stats = RunStats(executor, num_threads)
    if isinstance(rule, TrainingRule):
        circuit = rule.attach(circuit)
    machines = [Machine(circuit, rule)]
    outputs: Iterator[Output]
    if executor in ("inline", "sequential"):
        stats.num_workers, num_intra_op = 1, num_threads if executor == "sequential" else 1
        outputs = _with_intra_op(inline(machines[0], feed, clock=clock), num_intra_op, caller_modes())
    elif executor == "threads":
        workers = stats.num_workers = min(num_threads, circuit.num_stages)
        outputs = threads(machines[0], feed, clock=clock, num_workers=workers, max_in_flight=options.max_in_flight)
    else:
        machines, outputs = frame_parallel(circuit, rule, feed, clock=clock, num_workers=num_threads)
    return Run(outputs, feed, machines, stats)


def _check_draws(circuit: Circuit, executor: str) -> None:
    """Random numbers come in the model's order only where each frame is done before the next begins."""
    drawing = [stage.name for stage in circuit.stages if stage.draws]
    is_in_order = executor in ("inline", "sequential") and all(wire.delay == 0 for wire in circuit.wires)
    if drawing and not is_in_order and not (executor in ("inline", "threads") and len(circuit) == 1):
        raise CircuitError(
            f"stage {drawing[0]!r} draws random numbers, and frames that are worked on side by side would draw them in "
            "another order than the model; use executor='sequential', or put the model into eval() before the cut"
        )


def _with_intra_op(outputs: Iterator[Output], num_threads: int, modes: Modes) -> Iterator[Output]:
    """Let torch use ``num_threads`` inside each operator, in the caller's modes, only while an answer is being made."""
    while True:
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            with modes.here():
                output = next(outputs, None)
        finally:
            torch.set_num_threads(before)
        if output is None:
            return
        yield output


class _Peeked:
    """An iterable whose first item has been looked at; what else the source knows stays in reach."""

    def __init__(self, first: Any, rest: Iterator[Any], source: Any, clock: Clock) -> None:
        self._source, self._clock = source, clock
        self._first, self._rest = first, rest

    def __iter__(self) -> Iterator[Any]:
        first = self._first
        if isinstance(first, Frame) and not getattr(self._source, "wants_latency", False):
            first = replace(first, arrived_at_seconds=self._clock.now())  # a file's frame did not wait for the trials
        return itertools.chain([first], self._rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def _peek(frames: Iterable[Any], clock: Clock) -> tuple[Any, Iterable[Any]]:
    rest = iter(frames)
    first = next(rest, None)
    return first, _Peeked(first, rest, frames, clock)


def _live_rate(frames: Iterable[Any]) -> float | None:
    """Frame rate of a live source, or of a file replayed as one; None for a file, which wants throughput only."""
    info = getattr(frames, "info", None)
    return getattr(info, "frame_rate", None) if getattr(frames, "wants_latency", False) else None


class _Arriving:
    """Frames of a trial: they arrive when they are taken, so that their latency is that of the executor, which lets in
    as many as it would of the source."""

    def __init__(self, items: Iterator[Any], source: Iterable[Any], clock: Clock) -> None:
        self._items, self._clock = items, clock
        self.wants_latency = bool(getattr(source, "wants_latency", False))

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            yield replace(item, arrived_at_seconds=self._clock.now()) if isinstance(item, Frame) else item
