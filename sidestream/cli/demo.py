"""``sidestream demo``: a clip, a real model, frame by frame and pipelined in real time; video, chart and table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sidestream.cli.plan import ModelFlags, Plan, make_plan
from sidestream.cli.run import Job
from sidestream.errors import InputError, MissingExtraError, WriteError


def demo(
    source: str | None = None,
    out: Path = Path("demo_out"),
    model: str | None = None,
    seconds: float = 8.0,
    stages: str = "4",
    backend: str = "eager",
    latency: bool = False,
    weights: str | None = None,
    head: Literal["classes", "keypoints"] = "classes",
    num_classes: int | None = None,
    frame_rate: float | None = None,
    slow_motion: int = 1,
    timing: Literal["auto", "live", "simulated"] = "auto",
    predictive: bool = False,
) -> int:
    """Run a model on a clip twice at the camera's rate, frame by frame and pipelined, and compare.

    With --latency both are put side by side into one video, latency.mp4: the newest answer on the frame that the camera
    shows, so that it lags behind what moves, and below it the frame that each stage works on. Without weights, the
    answers are the exact truth of the frames that the model was given (shapes that move) or are not drawn (a file).

    Args:
        source: a video; default, or synthetic: a clip of moving shapes that is made first.
        out: folder for the clip, the annotated videos, the chart and the table.
        model: a model from `sidestream models` (default: efficientnet_lite0; with --latency torchvision/resnet50).
        seconds: length of the synthetic clip; with --latency of any.
        stages: number of stages.
        backend: what runs a stage: eager, onnxruntime, openvino.
        latency: make the side-by-side video. The flags below belong to it.
        weights: default (the library's own), or a local .safetensors / .pt file: the model's own answers are drawn.
        head: what a clip model answers with; a keypoint model has that head by itself.
        num_classes: classes (or keypoints) of the model's head, where they are not the library's.
        frame_rate: of the camera (default: 25, or the file's own).
        slow_motion: show everything so many times slower.
        timing: live (really run), simulated (computed from measured stage times), or auto: live where the machine has
            a core for each stage.
        predictive: a third side: all stages read the newest there is (a net trained to predict; needs --weights).
    """
    from rich.console import Console

    from sidestream.circuit.chart import chart, chart_png
    from sidestream.circuit.forecast import forecast
    from sidestream.cli.demo_notes import CpuTimes
    from sidestream.engine.run import num_cores
    from sidestream.report.record import write_text
    from sidestream.report.table import markdown_table

    console = Console()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"--out {out} cannot be made a folder: {error.strerror}; give another name") from error
    if seconds <= 0:
        raise InputError(f"--seconds {seconds:g}; expected more than 0")
    if latency:
        from sidestream.cli.demo_latency import LatencyFlags, demo_latency

        flags = LatencyFlags(
            source, out, model, weights, head, num_classes, seconds, stages, backend, frame_rate, slow_motion, timing,
            predictive,
        )  # fmt: skip
        return demo_latency(flags, lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True))
    only = {
        "weights": weights, "num-classes": num_classes, "frame-rate": frame_rate, "predictive": predictive or None,
        "slow-motion": None if slow_motion == 1 else slow_motion, "head": None if head == "classes" else head,
    }  # fmt: skip
    if given := [f"--{name}" for name, value in only.items() if value is not None]:
        raise InputError(f"{given[0]} belongs to the side-by-side video; give --latency too")
    model = model or "efficientnet_lite0"
    clip = None if source == "synthetic" else source
    clip = clip or str(_make_clip(out / "clip.mp4", seconds))
    plan, weights = _plan(ModelFlags(model, stages=stages, executor="threads", backend=backend))
    K = plan.circuit.num_stages
    console.print(f"{model} with {weights} weights, {K} stage{'s' * (K > 1)}, back end {backend}")
    console.print(chart(plan.circuit, num_ticks=8), highlight=False, markup=False)
    predicted = forecast(plan.circuit, num_workers=num_cores())
    console.print(str(predicted), highlight=False, markup=False)
    rows = []
    before = CpuTimes.now()
    for name, executor in (("frame by frame, 1 thread", "inline"), ("pipelined", "threads")):
        job, shown = _play(plan, clip, executor)
        if job.was_interrupted:
            return 130
        summary = job.summary(name)
        rows.append(_row(name, summary))
        _draw(clip, shown, out / f"{executor}.mp4", banner=name)
    table = markdown_table(HEADER, rows)
    console.print(table, highlight=False, markup=False, soft_wrap=True)
    for line in _notes(predicted, summary, before):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    write_text(out / "table.md", table)
    made: list[str | Path] = [clip, out / "inline.mp4", out / "threads.mp4", out / "table.md"]
    try:
        made.append(chart_png(plan.circuit, out / "chart.png"))
    except MissingExtraError as error:
        console.print(f"no chart.png: {error}", markup=False)
    console.print("look at:\n" + "\n".join(f"  {path}" for path in made), highlight=False, markup=False)
    return 0


CLIP_RATE = 60.0
HEADER = ("real time", "frames in", "answered", "dropped", "frames/s", "latency p50 ms", "latency p95 ms")


@dataclass(frozen=True)
class Shown:
    """An answer as a viewer saw it: from when on, for which frame, what."""

    made_at_seconds: float
    """On the clip's own time axis."""
    frame_index: int
    lines: list[str]


def _make_clip(path: Path, seconds: float) -> Path:
    """Moving shapes with sound, 640 x 480 at 60 frames/s."""
    from sidestream.video import SyntheticVideo, write

    num_frames = max(1, round(CLIP_RATE * seconds))
    video = SyntheticVideo(seed=7, num_frames=num_frames, size_px=(480, 640), frame_rate=CLIP_RATE)
    sound = video.sound(0.0, seconds)
    return write(path, (video.frame(n) for n in range(num_frames)), frame_rate=CLIP_RATE, sound=sound)


def _plan(flags: ModelFlags) -> tuple[Plan, str]:
    """The plan with real weights, or with random ones where the package that ships them is not installed."""
    from dataclasses import replace

    try:
        return make_plan(flags), "real ImageNet"
    except MissingExtraError as error:
        if error.extra != "demo-weights":
            raise
        return make_plan(replace(flags, weights="random")), "random (install sidestream[demo-weights] for real ones)"


def _play(plan: Plan, clip: str, executor: str) -> tuple[Job, list[Shown]]:
    """The clip as if live through the model. Nothing is drawn meanwhile: that would take the model's time."""
    from sidestream.cli.answers import answer_lines, top_classes
    from sidestream.clock import WallClock
    from sidestream.engine import run
    from sidestream.engine.executors.frame_parallel import undelayed
    from sidestream.video import stream

    clock = WallClock()
    circuit = undelayed(plan.circuit) if executor == "inline" else plan.circuit
    shown: list[Shown] = []

    def note(output: Any) -> None:
        made_at = output.made_at_seconds - output.arrived_at_seconds + output.pts_seconds
        lines = answer_lines(top_classes(output.value, plan.labels, top_k=3))
        shown.append(Shown(made_at, output.frame_index, lines))

    with stream(clip, real_time=True, clock=clock) as frames:
        running: Any = run(circuit, frames, executor=executor, prepare=plan.input_spec, clock=clock)
        job = Job(plan, frames, running, also=note)
        job.work(None, None)
    return job, shown


def _draw(clip: str, shown: list[Shown], out: Path, *, banner: str) -> None:
    """Every frame of the clip, with the answer that was the latest one when the frame was shown."""
    from sidestream.video import VideoWriter, overlay, stream

    with stream(clip) as frames, VideoWriter(out, frame_rate=frames.info.frame_rate or 25.0, fit=True) as writer:
        answers, latest = iter(shown), None
        following = next(answers, None)
        for frame in frames:
            while following is not None and following.made_at_seconds <= frame.pts_seconds:
                latest, following = following, next(answers, None)
            age = "no answer yet" if latest is None else f"answer to {frame.index - latest.frame_index} frames ago"
            lines = None if latest is None else latest.lines
            writer.add(overlay(frame, labels=lines, timing={"frame": str(frame.index), "": age}, banner=banner))


def _row(name: str, summary: Any) -> list[object]:
    from sidestream.report.measure import percentiles

    p50, p95 = (1e3 * v for v in percentiles(summary.latencies_seconds, (50, 95)))
    counts = [summary.num_frames_in, summary.num_answered, summary.num_dropped]
    return [name, *counts, summary.frames_per_second, p50, p95]


def _notes(predicted: Any, summary: Any, before: Any) -> list[str]:
    """Why the pipelined run stayed below the forecast, as far as it can be seen from outside."""
    import os

    from sidestream.cli.demo_notes import CpuTimes, cores_of_others, notes

    now = CpuTimes.now()
    seconds = summary.wall_seconds
    return notes(
        predicted.frames_per_second,
        summary.num_frames_in / seconds if seconds > 0 else 0.0,
        others=cores_of_others(before, now),
        num_cores=len(os.sched_getaffinity(0)) if now else 0,
        num_workers=predicted.num_workers,
    )
