"""``sidestream demo --latency``: one clip, one model, frame by frame and pipelined side by side, with stale answers.

Stage times are measured on this machine. With a core for each stage the two sides are really run in real time; with
fewer, the schedule of one worker per stage is computed from the measured times, and the picture says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sidestream.cli.demo_latency_lanes import (
    Lane,
    as_lane,
    live_lane,
    measured,
    pipelined_schedule,
    predictive_schedule,
    sequential_schedule,
)
from sidestream.cli.demo_latency_subject import (
    CLIP,
    Answering,
    Subject,
    answering,
    file_subject,
    mean_iou,
    synthetic_subject,
    truth_of,
)
from sidestream.clock import WallClock
from sidestream.errors import InputError
from sidestream.report.words import counted

MODEL = "torchvision/resnet50"
FRAME_RATE = 25.0
PANEL_PX = (352, 624)
MEASURE_SECONDS = 10.0
Timing = Literal["auto", "live", "simulated"]


@dataclass(frozen=True)
class LatencyFlags:
    """The flags of the command."""

    source: str | None
    out: Path
    model: str | None
    weights: str | None
    head: str
    num_classes: int | None
    seconds: float
    stages: str
    backend: str
    frame_rate: float | None
    slow_motion: int
    timing: Timing
    predictive: bool
    panel_px: tuple[int, int] = PANEL_PX


def demo_latency(flags: LatencyFlags, say: Callable[[str], None]) -> int:
    """Make latency.mp4, latency.png, the logs and the table in ``flags.out``, and say where they are."""
    from sidestream.cli.demo_latency_film import film, still
    from sidestream.cli.demo_latency_picture import Scene
    from sidestream.report.measure import num_cores
    from sidestream.report.record import write_text

    _check(flags)
    subject = _subject(flags)
    plan = _plan(flags)
    answers = answering(subject, plan, flags.weights)
    is_live = flags.timing == "live" or (flags.timing == "auto" and num_cores() >= plan.circuit.num_stages)
    if is_live and flags.predictive:
        raise InputError("--predictive is simulated only; give --timing simulated")
    lanes = _live(plan, subject, answers) if is_live else _simulated(plan, subject, answers, flags)
    offline = _offline(plan, subject, answers)
    truths, truth_name = truth_of(subject, answers, None if offline is None else [a.value for a in offline])
    _write_logs(flags.out, lanes, offline, truths, about=_about(plan, lanes, is_live))
    caption = [*_caption(plan, lanes, is_live, num_cores()), answers.note]
    scene = Scene(
        lanes, subject.frames, subject.frame_rate, _drawer(answers), caption, flags.panel_px,
        shows_answered=answers.kind in ("none", "classes"),
    )  # fmt: skip
    made = film(scene, flags.out / "latency.mp4", slow_motion=flags.slow_motion)
    made += [still(scene, flags.out / "latency.png")]
    header, rows = table_of(lanes, subject, offline, truths)
    from sidestream.report.table import markdown_table

    table = markdown_table(header, rows)
    write_text(flags.out / "latency.md", "\n".join([table, *caption, ""]))
    say(table)
    for line in (*caption, *([f"Judged against {truth_name}."] if truths else [])):
        say(line)
    logs = [flags.out / f"{_file(lane)}.jsonl" for lane in lanes]
    say("look at:\n" + "\n".join(f"  {path}" for path in (*made, flags.out / "latency.md", *logs)))
    return 0


def table_of(
    lanes: Sequence[Lane], subject: Subject, offline: Any, truths: Any
) -> tuple[tuple[str, ...], list[list[object]]]:
    """Header and rows: what each lane answered, how old its answers were on the screen, and what they are worth."""
    from sidestream.evals.streaming import Boxes, FrameTruth, main_figure, pair, score

    header: tuple[str, ...] = ("", "answers/s", "answered", "dropped", "mean age ms", "largest age ms")
    frames = [FrameTruth(CLIP, f.index, f.pts_seconds, None) for f in subject.frames]  # type: ignore[arg-type]
    duration = len(subject.frames) / subject.frame_rate
    rows: list[list[object]] = []
    for lane in lanes:
        ages = [1e3 * (p.query_seconds - p.answer.pts_seconds) for p in pair(frames, lane.answers) if p.answer]
        rate = sum(a.ready_seconds <= duration for a in lane.answers) / duration
        taken = len({span.frame_index for span in lane.spans})
        shown = [statistics.fmean(ages), max(ages)] if ages else ["", ""]
        rows.append([lane.title, rate, len(lane.answers), len(subject.frames) - taken, *shown])
    if not truths:
        return header, rows
    judged = [pair(truths, lane.answers) for lane in lanes]
    ceiling = [pair(truths, offline)] if offline is not None else []
    figures: list[tuple[str, Callable[[Any], float]]] = [
        (main_figure(score(judged[0]))[0], lambda pairs: main_figure(score(pairs))[1])
    ]
    if isinstance(truths[0].value, Boxes):
        figures.append(("mean IoU", mean_iou))
    rows += [["offline (no time taken)", "", len(subject.frames), 0, 0.0, 0.0]] if ceiling else []
    for row, pairs in zip(rows, (*judged, *ceiling), strict=True):
        row += [f"{figure(pairs):.3f}" for _, figure in figures]
    return (*header, *(name for name, _ in figures)), rows


def _check(flags: LatencyFlags) -> None:
    if flags.frame_rate is not None and not 0 < flags.frame_rate <= 1000:
        raise InputError(f"--frame-rate {flags.frame_rate}; give frames per second, above 0 and at most 1000")
    if flags.slow_motion < 1:
        raise InputError(f"--slow-motion {flags.slow_motion}; give a whole number from 1 on")
    if not flags.stages.isdigit() or int(flags.stages) < 2:
        raise InputError(f"--stages {flags.stages!r}; a pipeline to look at needs a number from 2 on")
    if flags.predictive and flags.weights is None:
        raise InputError("--predictive draws what the net itself predicts; give --model and --weights")


def _subject(flags: LatencyFlags) -> Subject:
    rate = flags.frame_rate or FRAME_RATE
    num_frames = max(2, round(flags.seconds * rate))
    if flags.source in (None, "synthetic"):
        return synthetic_subject(num_frames, rate, flags.panel_px)
    assert flags.source is not None
    return file_subject(flags.source, num_frames, flags.frame_rate, flags.panel_px)


def _plan(flags: LatencyFlags) -> Any:
    from sidestream.cli.plan import ModelFlags, make_plan

    model = flags.model or MODEL
    return make_plan(
        ModelFlags(
            model,
            flags.weights or "random",
            num_classes=flags.num_classes,
            stages=flags.stages,
            executor="threads",
            backend=flags.backend,
            head=flags.head,
            takes_points=True,
        )
    )


def _live(plan: Any, subject: Subject, answers: Answering) -> list[Lane]:
    from sidestream.engine.executors.frame_parallel import undelayed

    given: dict[str, Any] = {"answer": answers, "clip": CLIP, "prepare": plan.input_spec}
    sequential, pipelined = undelayed(plan.circuit), plan.circuit
    return [
        live_lane("sequential", sequential, subject.frames, executor="inline", **given),
        live_lane(_pipelined(plan), pipelined, subject.frames, executor="threads", **given),
    ]


def _simulated(plan: Any, subject: Subject, answers: Answering, flags: LatencyFlags) -> list[Lane]:
    from sidestream.circuit.ages import lags_of
    from sidestream.engine.executors.frame_parallel import undelayed
    from sidestream.evals.streaming import run_simulated, scheduled_answers

    clock = None if plan.backend == "eager" else WallClock()  # other back ends may work on threads of their own
    profile = measured(plan.circuit, subject.frames, prepare=plan.input_spec, seconds=MEASURE_SECONDS, clock=clock)
    profile.write(flags.out / "runtimes.json", model=plan.circuit.name)
    rate, num_frames = subject.frame_rate, len(subject.frames)

    def lane(title: str, circuit: Any, schedule: Any, **options: Any) -> Lane:
        if answers.of_output is None:
            found = scheduled_answers(schedule.works, answers.by_frame, frame_rate=rate, clip=CLIP)
        else:
            found = run_simulated(
                circuit, subject.frames, schedule.works, frame_rate=rate, answer=answers, clip=CLIP,
                prepare=plan.input_spec, **options,
            )  # fmt: skip
        return as_lane(title, schedule, found, plan.circuit.num_stages)

    def rows() -> Any:
        return profile.draw_rows(rate)

    sequential = sequential_schedule(num_frames, rows(), frame_rate=rate)
    pipelined = pipelined_schedule(num_frames, rows(), frame_rate=rate)
    lanes = [
        lane("sequential", undelayed(plan.circuit), sequential),
        lane(_pipelined(plan), plan.circuit, pipelined),
    ]
    if flags.predictive:
        circuit = _predictive(plan.circuit)
        schedule = predictive_schedule(num_frames, rows(), frame_rate=rate, lags=lags_of(circuit)[1:])
        lanes.append(lane("predictive parallel", circuit, schedule, judged_frame="newest"))
    return lanes


def _predictive(circuit: Any) -> Any:
    """The same stages in the parallel wiring."""
    from sidestream.circuit.stage import Link, Stages
    from sidestream.circuit.wiring import parallel

    links = tuple(Link(w.source, w.output, w.target, w.input) for w in circuit.wires)
    stages = Stages(circuit.stages, links, circuit.in_spec, circuit.out_spec, circuit.name, circuit.input_spec)
    return parallel(stages)


def _offline(plan: Any, subject: Subject, answers: Answering) -> Any:
    """Every frame answered at once; None where there are no answers."""
    from sidestream.engine.executors.frame_parallel import undelayed
    from sidestream.evals.streaming import Answer, run_offline

    if answers.kind == "none":
        return None
    if answers.of_output is None:
        times = [(f.index, f.pts_seconds) for f in subject.frames]
        return [Answer(CLIP, n, due, due, due, value) for (n, due), value in zip(times, answers.by_frame, strict=True)]
    circuit = undelayed(plan.circuit)
    return run_offline(circuit, subject.frames, answer=answers, clip=CLIP, prepare=plan.input_spec)


def _drawer(answers: Answering) -> Any:
    from sidestream.video import overlay

    def draw(frame: Any, answer: Any) -> Any:
        return frame if answer is None else overlay(frame, **answers.draw(answer.value))

    return draw


def _pipelined(plan: Any) -> str:
    return f"pipelined, {counted(plan.circuit.num_stages, 'stage')}"


def _stage_ms(lane: Lane) -> list[float]:
    """Median time of each stage."""
    times = [[s.end_seconds - s.start_seconds for s in lane.spans if s.stage == n] for n in range(lane.num_stages)]
    return [1e3 * statistics.median(each) for each in times]


def _caption(plan: Any, lanes: Sequence[Lane], is_live: bool, cores: int) -> list[str]:
    ms = " + ".join(f"{each:.0f}" for each in _stage_ms(lanes[1]))
    stages = f"{plan.circuit.name} in {counted(plan.circuit.num_stages, 'stage')}: {ms} ms"
    if is_live:
        return [f"{stages}, as run.", f"Really run in real time, one worker per stage; this machine has {cores} cores."]
    kind = "processor" if plan.backend == "eager" else "wall"
    return [
        f"{stages} ({kind} time of one thread, measured on this machine).",
        f"Computed from measured stage times: one worker per stage, each with a core (this machine has {cores} cores).",
    ]


def _about(plan: Any, lanes: Sequence[Lane], is_live: bool) -> dict[str, Any]:
    from sidestream.report import machine

    about = {"model": plan.circuit.name, "stage_ms": _stage_ms(lanes[1]), "is_simulated": not is_live}
    return about | {"machine": machine()}


def _file(lane: Lane) -> str:
    return lane.title.partition(",")[0].replace(" ", "_")


def _write_logs(out: Path, lanes: Sequence[Lane], offline: Any, truths: Any, *, about: dict[str, Any]) -> None:
    from sidestream.evals.streaming import write_answers, write_truth

    for lane in lanes:
        write_answers(out / f"{_file(lane)}.jsonl", lane.answers, about={**about, "lane": lane.title})
    if truths:
        write_truth(out / "truth.jsonl", truths)
    if offline is not None:
        write_answers(out / "offline.jsonl", offline, about=about)
