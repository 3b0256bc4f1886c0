"""``sidestream run A B C``: several streams through one model, each answered as if it ran alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidestream.cli.early import check_out_folder, check_source
from sidestream.cli.film import Film, Watched
from sidestream.cli.interrupt import on_interrupt
from sidestream.cli.plan import ModelFlags, Plan, make_plan, report_choice
from sidestream.errors import InputError, SourceError
from sidestream.report.words import counted

if TYPE_CHECKING:
    from sidestream.cli.answers import Reading
    from sidestream.engine import ManyRun


def named_sources(words: Sequence[str]) -> tuple[str, ...]:
    """The sources of a command line: as they are, and for ``@FILE`` those in its lines (``#`` begins a remark).

    Raises InputError for none, for one that is given twice, and for a list that cannot be read.
    """
    sources: list[str] = []
    for word in words:
        sources += _listed(Path(word[1:])) if word.startswith("@") else [word]
    if not sources:
        raise InputError("no source was given; name a file, a folder, camera[:N], a network address or synthetic")
    if twice := {s for s in sources if sources.count(s) > 1}:
        raise InputError(f"source {min(twice)!r} was given twice; answers name their source, so give each once")
    for source in sources:
        check_source(source)
    return tuple(sources)


def _listed(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"@{path}: the list of sources cannot be read ({error}); give a text file, a source per line"
        ) from None
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise InputError(f"@{path} names no source; write one per line")
    return found


def run_several(
    sources: Sequence[str], flags: ModelFlags, *, top_k: int, out: Path | None, json: Path | None, **options: Any
) -> int:
    """Run the command; ``options`` are those of ``video.stream``."""
    from sidestream.clock import WallClock
    from sidestream.engine import EXECUTORS_OF_MANY, run_many
    from sidestream.video import stream

    if flags.executor not in (*EXECUTORS_OF_MANY, "auto"):
        raise InputError(
            f"--executor {flags.executor} runs one source, but {len(sources)} were given; "
            f"leave it out, or give one of {', '.join(EXECUTORS_OF_MANY)}"
        )
    if out is not None:
        check_out_folder("--out", out)
    clock = WallClock()
    with contextlib.ExitStack() as opened:
        streams = {name: opened.enter_context(stream(name, clock=clock, **options)) for name in sources}
        plan, note = plan_for_many(flags, len(sources))
        for frames in streams.values():
            frames.catch_up()  # what came while the model was made ready does not count
        job = ManyJob(plan, streams, top_k=top_k, note=note)
        job.running = run_many(
            plan.circuit,
            {name: job.watched(name) if out else frames for name, frames in streams.items()},
            executor="inline" if flags.executor == "inline" else "threads",
            prepare=plan.input_spec,
            num_threads=flags.threads,
            clock=clock,
        )
        job.work(out, json)
        job.report(flags.model)
        if job.was_interrupted:
            return 130
        return 1 if job.running.failures else 0


def plan_for_many(flags: ModelFlags, num_streams: int) -> tuple[Plan, str]:
    """The circuit, and why it is cut so. Where there are as many streams as workers, whole models side by side keep
    all workers busy, so that a cut has nothing to add; a back end is then chosen by its speed on one thread."""
    from sidestream.report.measure import num_cores

    num_workers = flags.threads or num_cores()
    note = ""
    if flags.stages == "auto" and not flags.cut and num_streams >= num_workers:
        note = f"{num_streams} streams keep {counted(num_workers, 'worker')} busy with the whole model: it is not cut"
        flags = replace(flags, stages="1", threads=1)
    if flags.backend != "auto":
        flags = replace(flags, executor="inline" if flags.executor == "inline" else "threads")
    else:
        flags = replace(flags, executor="auto")
    return make_plan(flags), note


@dataclass
class ManyJob:
    """One run of the command on several sources: the loop over the answers, what it writes, and the closing table."""

    plan: Plan
    streams: dict[str, Any]
    running: ManyRun = None  # type: ignore[assignment]  # is begun when the job is there to watch it
    top_k: int = 5
    note: str = ""
    was_interrupted: bool = False

    def __post_init__(self) -> None:
        self.films: dict[str, Film] = {}
        self.num_written = dict.fromkeys(self.streams, 0)

    def watched(self, name: str) -> Watched:
        """A stream whose frames are kept for its video."""
        return Watched(self.streams[name], lambda frame: self.films[name].see(frame) if name in self.films else None)

    @property
    def read(self) -> Callable[[Any], Reading]:
        """From an answer to what it says."""
        from sidestream.cli.answers import class_reader, points_reader

        if self.plan.has_points:
            return points_reader(self.plan.input_spec)
        return class_reader(self.plan.labels, top_k=self.top_k)

    def work(self, out: Path | None, json: Path | None) -> None:
        """Answer every frame of every stream. A source that fails ends alone; what was answered is kept."""
        with contextlib.ExitStack() as files, on_interrupt(self._interrupt):
            add = self._open(files, out, json)
            with self.running:
                try:
                    for output in self.running:
                        add(output)
                except Exception:
                    if not self.running.failures or not any(self.num_written.values()):
                        raise
        if not self.was_interrupted:
            self._check_answered()

    def _check_answered(self) -> None:
        stats = self.running.stats
        silent = [n for n, num in self.num_written.items() if num == 0 and n not in self.running.failures]
        if short := [name for name in silent if stats[name].num_frames]:
            raise SourceError(
                f"{short[0]}: the video has {counted(stats[short[0]].num_frames, 'frame')}, too few for an answer of "
                f"this model, which takes {self.plan.least_frames} or more"
            )

    def _open(self, files: contextlib.ExitStack, out: Path | None, json: Path | None) -> Callable[[Any], None]:
        from sidestream.cli.answers import answer_record
        from sidestream.report.record import json_lines

        read = self.read
        write = files.enter_context(json_lines(json)) if json else None
        if out is not None:
            self._open_films(files, out, read)

        def add(output: Any) -> None:
            reading = read(output)
            if write:
                write({"source": output.source, **answer_record(output, reading.fields)})
            if output.source in self.films:
                self.films[output.source].add(output)
            self.num_written[output.source] += 1

        return add

    def _open_films(self, files: contextlib.ExitStack, out: Path, read: Callable[[Any], Reading]) -> None:
        from sidestream.video import VideoWriter, overlay

        out.mkdir(parents=True, exist_ok=True)
        for name, path in zip(self.streams, video_names(out, list(self.streams)), strict=True):
            rate = self.streams[name].info.frame_rate or 25.0
            video = files.enter_context(VideoWriter(path, frame_rate=rate, fit=True))

            def show(frame: Any, output: Any, video: Any = video) -> None:
                if output is None:
                    video.add(overlay(frame))
                    return
                timing = {"frame": str(output.frame_index), "age ms": output.latency_seconds * 1e3}
                video.add(overlay(frame, timing=timing, **read(output).drawing))

            film = self.films[name] = Film(show)

            def end(name: str = name, video: Any = video, film: Film = film) -> None:
                if self.num_written[name] == 0:
                    video.discard()
                else:
                    film.finish()

            files.callback(end)

    def _interrupt(self) -> None:
        self.was_interrupted = True
        self.running.stop()
        for frames in self.streams.values():
            frames.stop()

    def report(self, model: str) -> None:
        """Print a row per stream, and what became of those that failed."""
        from rich.console import Console

        from sidestream.report.measure import peak_rss_bytes
        from sidestream.report.table import StreamRow, streams_table

        console = Console()
        circuit, stats = self.plan.circuit, self.running.stats
        rows = []
        for name, frames in self.streams.items():
            own, source = stats[name], frames.stats
            rows.append(
                StreamRow(
                    name,
                    source.num_frames + source.num_dropped,
                    own.num_answered,
                    source.num_dropped,
                    own.frames_per_second,
                    tuple(own.latencies_seconds),
                    source.num_reconnects,
                )
            )
        how = f"{counted(circuit.num_stages, 'stage')}, {circuit.wiring}, {stats[rows[0].name].executor}"
        title = f"{model} on {counted(len(rows), 'stream')}: {how}, {self.plan.backend}"
        console.print(streams_table(rows, title, peak_memory_bytes=peak_rss_bytes()))
        report_choice(console, self.plan, None)
        if self.note:
            console.print(self.note, highlight=False)
        for name, failure in self.running.failures.items():
            console.print(f"{name} ended early: {failure}", highlight=False, markup=False)


def video_names(folder: Path, sources: Sequence[str]) -> list[Path]:
    """A file for each source: its number and the last part of its name."""
    names = []
    for number, source in enumerate(sources, start=1):
        stem = Path(source.partition("?")[0].rstrip("/")).stem if "synthetic" not in source else "synthetic"
        plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in stem)[:60]
        names.append(folder / f"{number:02}-{plain or 'source'}.mp4")
    return names
