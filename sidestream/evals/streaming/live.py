"""Runs that leave a log: live at the camera's rate, offline without a clock, and live on a simulated device.

run_live         real time: frames come at the camera's rate, the newest waits, answers are ready when they are made
run_offline      every frame is answered, at once: what the model could do if it took no time
run_simulated    a schedule says which frames are taken up and when answers are ready; only those are fed
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sidestream.circuit.wire import Circuit
from sidestream.clock import Clock, WallClock
from sidestream.engine import run
from sidestream.errors import InputError, SourceError
from sidestream.evals.streaming.log import Answer
from sidestream.evals.streaming.schedule import Work
from sidestream.evals.streaming.values import Value
from sidestream.types import Frame, Output
from sidestream.video.policy import parse_policy
from sidestream.video.sources import StreamInfo
from sidestream.video.stream import Stream, stream

ToValue = Callable[[Output], Value]
"""From what the model answered (``output.value``, ``output.frame``) to what is logged."""
JudgedFrame = Literal["answered", "newest"]
"""Which frame an answer is logged for: the one that it answers, or the newest of its tick (a net that was trained to
predict: its answer speaks of the frame that came in last).

A chain of stages may have made the answer of a tick before the tick's frame is there, as it reads only older ones. It
is held until that frame is taken up: only then is it known, where frames are dropped, of which frame it speaks.
"""


def run_live(
    circuit: Circuit,
    source: Any,
    *,
    answer: ToValue,
    clip: str,
    executor: str = "threads",
    judged_frame: JudgedFrame = "answered",
    clock: Clock | None = None,
    **options: Any,
) -> list[Answer]:
    """Replay ``source`` at its own rate through the engine; only the newest frame waits while the model is busy.

    Answers are kept as they come and turned into values after the run, so that this costs the model no time. Those of
    ticks in which a register still held its initial value are left out.

    Args:
        source: anything that ``video.stream`` opens, or a list of ``Frame`` in memory (decoding costs nothing then).
        answer: from an output to the value that is logged.
        clip: its name in the log.
        executor: as in ``run``.
        judged_frame: see ``JudgedFrame``.
        clock: a wall clock, or one that a test moves.
        options: ``prepare`` and ``num_threads`` of ``run``.
    """
    clock = clock or WallClock()
    frames = _replay(source, clock)
    with frames:
        fed = _Fed(frames, clock)
        outputs = list(run(circuit, fed, executor=executor, clock=clock, **options))
    if not outputs:
        return []
    start_seconds = outputs[0].arrived_at_seconds - outputs[0].pts_seconds  # when the first frame was due
    return [
        Answer(
            clip,
            tick.frame_index,
            tick.pts_seconds,
            tick.arrived_at_seconds - start_seconds,
            max(out.made_at_seconds, tick.began_at_seconds) - start_seconds,
            answer(out),
        )
        for out, tick in fed.ticks_of(outputs, judged_frame)
    ]


def run_offline(
    circuit: Circuit,
    frames: Iterable[Frame],
    *,
    answer: ToValue,
    clip: str,
    judged_frame: JudgedFrame = "answered",
    **options: Any,
) -> list[Answer]:
    """Answer every frame, each ready the moment that its frame is due: a model that takes no time.

    The answer to a frame may stem from later frames where the circuit holds some back; it is still logged at the
    judged frame's own time. ``options``: ``prepare``, ``num_threads`` and ``executor`` (default "inline") of ``run``.
    """
    options.setdefault("executor", "inline")
    fed = _Fed(frames)
    found = []
    for out, tick in fed.ticks_of(run(circuit, fed, **options), judged_frame):
        due = tick.pts_seconds
        found.append(Answer(clip, tick.frame_index, due, due, due, answer(out)))
    return found


def run_simulated(
    circuit: Circuit,
    frames: Sequence[Frame],
    works: Sequence[Work],
    *,
    frame_rate: float,
    answer: ToValue,
    clip: str,
    judged_frame: JudgedFrame = "answered",
    prepare: Any = None,
) -> list[Answer]:
    """Feed the frames of a schedule to the engine on one thread; answers are ready when the schedule says.

    A model with a memory sees exactly the frames that it would have seen live. Repeatable: nothing is timed. The
    schedule is in frames, of which ``frame_rate`` come a second; ``Work.ready`` is when the answer to that frame is
    made, as many ticks later as the circuit answers it.
    """
    order = sorted(works, key=lambda work: work.frame_index)
    if order and order[-1].frame_index >= len(frames):
        raise InputError(f"the schedule takes up frame {order[-1].frame_index} of {len(frames)} frames")
    work_of = {work.frame_index: work for work in order}
    due = [replace(frames[w.frame_index], index=w.frame_index, pts_seconds=w.frame_index / frame_rate) for w in order]
    fed = _Fed(due)
    outputs = run(circuit, fed, executor="inline", prepare=prepare)
    found = []
    for out, tick in fed.ticks_of(outputs, judged_frame):
        ready = max(work_of[out.frame_index].ready, work_of[tick.frame_index].start)
        came = tick.pts_seconds
        found.append(Answer(clip, tick.frame_index, came, came, float(ready) / frame_rate, answer(out)))
    return found


def scheduled_answers(
    works: Sequence[Work], values: Mapping[int, Value] | Sequence[Value], *, frame_rate: float, clip: str
) -> list[Answer]:
    """The log of a schedule for a model without memory, from its answers to the frames, by number."""
    return [
        Answer(
            clip,
            work.frame_index,
            work.frame_index / frame_rate,
            work.frame_index / frame_rate,
            float(work.ready) / frame_rate,
            values[work.frame_index],
        )
        for work in works
    ]


def at_rate(frames: Iterable[Frame], frame_rate: float | None) -> list[Frame]:
    """The frames as a camera of that rate would have shown them: numbered from 0, at even times. None: as they are."""
    return [
        replace(f, index=n, pts_seconds=f.pts_seconds if frame_rate is None else n / frame_rate)
        for n, f in enumerate(frames)
    ]


def _replay(source: Any, clock: Clock) -> Stream:
    if not isinstance(source, list | tuple):
        return stream(source, real_time=True, policy="newest", clock=clock)
    if not source:
        raise SourceError("a clip of no frames cannot be replayed; give one or more")
    return Stream(_InMemory(source), parse_policy("newest"), real_time=True, clock=clock, max_frames=None)


@dataclass(frozen=True, slots=True)
class _Tick:
    """The frame that went in at a tick, and when, by the run's clock."""

    frame_index: int
    pts_seconds: float
    arrived_at_seconds: float
    began_at_seconds: float


class _Fed:
    """Frames on their way into a run: remembers which one went in at each tick."""

    def __init__(self, frames: Iterable[Frame], clock: Clock | None = None) -> None:
        self._frames, self._clock = frames, clock or WallClock()
        self._ticks: list[_Tick] = []

    def __iter__(self) -> Iterator[Frame]:
        for frame in self._frames:
            now = self._clock.now()
            arrived_at = now if frame.arrived_at_seconds is None else frame.arrived_at_seconds
            self._ticks.append(_Tick(frame.index, frame.pts_seconds, arrived_at, now))
            yield frame

    def __getattr__(self, name: str) -> Any:
        return getattr(self._frames, name)  # what else a run asks of a stream

    def ticks_of(self, outputs: Iterable[Output], judged_frame: JudgedFrame) -> Iterator[tuple[Output, _Tick]]:
        """Each answer with the tick of the frame that it is judged as; without those of ticks that do not count.

        Left out: ticks in which a register still held its initial value, and for "newest" those after the last frame.
        """
        for out in list(outputs):
            number = out.tick - (out.age_ticks if judged_frame == "answered" else 0)
            if not out.is_warm_up and number < len(self._ticks):
                yield out, self._ticks[number]


class _InMemory:
    """Frames in memory as a source of ``Stream``."""

    num_corrupt_packets = num_reconnects = 0

    def __init__(self, frames: Sequence[Frame]) -> None:
        self._frames, self._stopped = frames, False
        height, width = frames[0].size_px
        duration = frames[-1].pts_seconds
        rate = (len(frames) - 1) / duration if duration > 0 else None
        self.info = StreamInfo("frames in memory", width, height, rate, False, duration)

    def frames(self) -> Iterator[Frame]:
        for frame in self._frames:
            if self._stopped:
                return
            yield frame

    def stop(self) -> None:
        self._stopped = True

    def close(self) -> None:
        pass
