"""``sidestream run``: a model on a stream, stages in parallel; answers, an annotated video and honest timings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sidestream.cli.film import Film, Watched
from sidestream.cli.interrupt import on_interrupt
from sidestream.cli.plan import ModelFlags, Plan, check_flags, make_plan, report_choice
from sidestream.cli.run_many import named_sources, run_several
from sidestream.errors import InputError, SidestreamError, SourceError, WriteError
from sidestream.report.words import counted, ordinal

if TYPE_CHECKING:
    from sidestream.cli.answers import Reading


def run(
    source: Annotated[tuple[str, ...], tyro.conf.Positional],
    model: str = "efficientnet_lite0",
    weights: str = "default",
    labels: Path | None = None,
    stages: str = "auto",
    cut: tuple[str, ...] = (),
    wiring: str = "pipelined",
    executor: str = "auto",
    backend: str = "eager",
    real_time: bool = False,
    policy: str | None = None,
    out: Path | None = None,
    json: Path | None = None,
    top_k: int = 5,
    threads: int | None = None,
    max_frames: int | None = None,
    frame_rate: float | None = None,
    num_classes: int | None = None,
    head: Literal["classes", "keypoints"] = "classes",
    no_cache: bool = False,
) -> int:
    """Run a model on a video stream, or on several at once: one answer per frame.

    Args:
        source: a video file, a folder of images, camera[:N], a network address (rtsp, http, udp, tcp), or synthetic;
            several, or @FILE with one per line, go through one model side by side.
        model: a name from `sidestream models` (torchvision and timm names work).
        weights: default (the library's own), random, or a local .safetensors / .pt file.
        labels: file with one label per line, or a JSON list.
        stages: number of stages that the model is cut into, or auto.
        cut: dotted names of modules at which stages begin, instead of a balanced cut.
        wiring: sequential, pipelined, parallel, or semi-parallel:G.
        executor: auto, threads, sequential, frame-parallel, or inline.
        backend: what runs a stage: eager, inductor, onnxruntime, openvino, or auto.
        real_time: replay a file at its own frame rate, as if live.
        policy: which frames a slow model misses: newest, lossless, or bounded:N.
        out: annotated video to write (.mp4, .mkv, .mov, .webm); of several sources a folder, with a video for each.
        json: answers to write, one JSON object per line.
        top_k: classes per answer.
        threads: worker threads (default: all cores).
        max_frames: stop after so many frames.
        frame_rate: frames per second of a folder, the synthetic source or a camera.
        num_classes: classes (or keypoints) of the model's head, where they are not the library's.
        head: what a clip model is given to answer with; a keypoint model has that head by itself.
        no_cache: measure which executor and back end are best, also where an earlier start found it, and keep nothing.
    """
    if top_k < 1:
        raise InputError(f"--top-k {top_k}; expected 1 or more")
    sources = named_sources(source)
    flags = ModelFlags(
        model, weights, labels, num_classes, stages, cut, wiring, executor, backend, threads, head, no_cache, True
    )
    if len(sources) > 1:
        for one in sources:
            check_target("--json", json, one)
        check_flags(flags)
        options = {"policy": policy, "real_time": real_time, "max_frames": max_frames, "frame_rate": frame_rate}
        return run_several(sources, flags, top_k=top_k, out=out, json=json, **options)
    (only,) = sources
    for flag, path in (("--out", out), ("--json", json)):
        check_target(flag, path, only)
    from sidestream.clock import WallClock
    from sidestream.engine import run as run_circuit
    from sidestream.video import stream
    from sidestream.video.write import FORMATS

    if out is not None and out.suffix.lower() not in FORMATS:
        raise WriteError(f"--out {out}: suffix {out.suffix!r} is not known; use one of {', '.join(FORMATS)}")
    check_flags(flags)
    clock = WallClock()
    frames = stream(only, policy=policy, real_time=real_time, clock=clock, max_frames=max_frames, frame_rate=frame_rate)
    with frames:
        live_rate = frames.info.frame_rate if frames.wants_latency else None
        with _status() as say:
            plan = make_plan(flags, frame_rate=live_rate, on_progress=say)
        frames.catch_up()  # what came while the model was made ready does not count
        job = Job(plan, frames, top_k=top_k, title=f"{model} on {only}")
        with _status() as say:
            say("starting" if plan.executor != "auto" else f"measuring which executor is best for {model}")
            job.running = run_circuit(
                plan.circuit,
                job.watched() if out else frames,
                executor=plan.executor,
                prepare=plan.input_spec,
                num_threads=threads,
                clock=clock,
            )
        job.work(out, json)
        job.report()
        return 130 if job.was_interrupted else 0


@dataclass
class Job:
    """One run of the command: the loop over the answers, what it writes, and the closing table."""

    plan: Plan
    frames: Any
    running: Any = None
    top_k: int = 5
    title: str = ""
    """Model and source, in words."""
    was_interrupted: bool = False
    num_written: int = 0
    failure: SidestreamError | OSError | None = field(default=None)
    also: Callable[[Any], None] | None = None
    """Called with every answer."""
    film: Film | None = None

    @cached_property
    def read(self) -> Callable[[Any], Reading]:
        """From an answer to what it says."""
        from sidestream.cli.answers import class_reader, points_reader

        if self.plan.has_points:
            return points_reader(self.plan.input_spec)
        return class_reader(self.plan.labels, top_k=self.top_k)

    def watched(self) -> Watched:
        """The stream to run on where a video is written: it also keeps the frames that get no answer of their own."""
        return Watched(self.frames, lambda frame: self.film.see(frame) if self.film else None)

    def work(self, out: Path | None, json: Path | None) -> None:
        """Answer every frame. What was answered is kept when a later frame fails; nothing is left when none was."""
        with contextlib.ExitStack() as files, on_interrupt(self._interrupt):
            add = self._open(files, out, json)
            with self.running, _progress(self.frames) as advance:
                try:
                    for output in self.running:
                        add(output)
                        advance()
                except (SidestreamError, OSError) as error:
                    if self.num_written == 0:
                        raise
                    self.failure = error
            self._check_answered()
        if self.failure is not None:
            raise self.failure

    def _check_answered(self) -> None:
        """A video that ended before the first answer is an error, and leaves no empty files."""
        if self.num_written == 0 and not self.was_interrupted and (num_frames := self.frames.stats.num_frames):
            raise SourceError(
                f"{self.title}: the video has {counted(num_frames, 'frame')}, too few for an answer of this model, "
                f"which takes {self.plan.least_frames} or more"
            )

    def _open(self, files: contextlib.ExitStack, out: Path | None, json: Path | None) -> Callable[[Any], None]:
        from sidestream.cli.answers import answer_record
        from sidestream.report.record import json_lines
        from sidestream.video import VideoWriter

        write = files.enter_context(json_lines(json)) if json else None
        rate = self.frames.info.frame_rate or 25.0
        video = files.enter_context(VideoWriter(out, frame_rate=rate, fit=True)) if out else None
        if video:
            film = self.film = Film(lambda frame, output: video.add(self._drawn(frame, output)))
            files.callback(lambda: video.discard() if self.num_written == 0 else film.finish())

        def add(output: Any) -> None:
            if self.also:
                self.also(output)
            reading = self.read(output)
            if write:
                write(answer_record(output, reading.fields))
            if self.film:
                self.film.add(output)
            self.num_written += 1

        return add

    def _drawn(self, frame: Any, output: Any) -> Any:
        from sidestream.video import overlay

        if output is None:  # no answer yet
            return overlay(frame)
        timing = {"frame": str(output.frame_index), "age ms": output.latency_seconds * 1e3}
        return overlay(frame, timing=timing, **self.read(output).drawing)

    def _interrupt(self) -> None:
        self.was_interrupted = True
        self.running.stop()
        self.frames.stop()

    def summary(self, title: str) -> Any:
        """The figures of the closing table."""
        from sidestream.report.measure import peak_rss_bytes
        from sidestream.report.table import RunSummary

        stats, source = self.running.stats, self.frames.stats
        names = [f"{n} {s.name}" for n, s in enumerate(self.plan.circuit.stages, start=1)]
        return RunSummary(
            num_frames_in=source.num_frames + source.num_dropped,
            num_answered=stats.num_answered,
            num_dropped=source.num_dropped,
            wall_seconds=stats.elapsed_seconds,
            latencies_seconds=tuple(stats.latencies_seconds),
            peak_memory_bytes=peak_rss_bytes(),
            busy_shares=dict(zip(names, stats.busy_shares, strict=False)),
            title=title,
        )

    def report(self) -> None:
        """Print the closing table, what was picked and why, and what was lost on the way."""
        from rich.console import Console

        from sidestream.report.table import summary_table

        console = Console()
        circuit, stats = self.plan.circuit, self.running.stats
        how = f"{counted(circuit.num_stages, 'stage')}, {circuit.wiring}, {stats.executor}, {self.plan.backend}"
        console.print(summary_table(self.summary(f"{self.title}: {how}")))
        report_choice(console, self.plan, self.running.choice)
        if (period := max(stage.period_ticks for stage in circuit.stages)) > 1:
            console.print(f"the model answers every {ordinal(period)} frame", highlight=False)
        source = self.frames.stats
        if source.num_corrupt_packets:
            console.print(f"{source.num_corrupt_packets} corrupt packets were skipped")
        if source.num_reconnects:
            console.print(f"the source dropped out {source.num_reconnects} times")


def check_target(flag: str, path: Path | None, source: str) -> None:
    """Refuse, before any work, an output that cannot be written or would replace the source. Raises WriteError."""
    if path is None:
        return
    if path.is_dir():
        raise WriteError(f"{flag} {path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise WriteError(f"{flag} {path}: there is no folder {path.parent}; make it first")
    if path.exists() and Path(source).exists() and path.samefile(source):
        raise WriteError(f"{flag} {path} is the source itself; give another name, so that it is not overwritten")


@contextlib.contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """A spinner that says what is being prepared (silent where the output is no terminal)."""
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield status.update


@contextlib.contextmanager
def _progress(frames: Any) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    rate, duration = frames.info.frame_rate, frames.info.duration_seconds
    total = round(rate * duration) if rate and duration else None
    columns = (TextColumn("frames"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("frames", total=total)
        yield lambda: progress.advance(task)
