"""``sidestream evaluate``: how good a model is on labelled clips, offline and judged live; or what a log is worth."""

from __future__ import annotations

import inspect
import json as json_module
from pathlib import Path
from typing import Any, Literal

from sidestream.cli.evaluate_film import evaluation_film
from sidestream.cli.evaluate_flags import check_flags
from sidestream.cli.evaluate_table import dataset_joints, joint_fields, show
from sidestream.errors import InputError, WriteError

LEAST_FIGURE = 0.01
"""Of an offline figure below this no share is taken."""
FRAMES_OF_FRAME_MODELS = 8
"""Frames of a clip, of which a frame model reads each by itself and the logits are averaged."""


def evaluate(
    data: str | None = None,
    model: str | None = None,
    weights: str = "default",
    head: Literal["classes", "keypoints"] = "classes",
    streaming: bool = False,
    log: Path | None = None,
    truth: Path | None = None,
    out: Path | None = None,
    video: int = 0,
    json: Path | None = None,
    frame_rate: float = 25.0,
    eta: float = 0.0,
    forecast: bool = False,
    predictive: bool = False,
    stages: int | None = None,
    wiring: str = "pipelined",
    executor: str = "threads",
    runtime_ms: tuple[float, ...] = (),
    profile: Path | None = None,
    policy: str = "idle-free",
    seed: int = 0,
    max_clips: int | None = None,
    split: str | None = None,
    root: Path | None = None,
    num_frames: int | None = None,
    size: int | None = None,
    frame_step: int | None = None,
    batch_size: int = 16,
    threads: int | None = None,
) -> int:
    """Evaluate a model on the test part of labelled clips, or score a log.

    Offline (the default), each clip has one answer. With --streaming the clips are replayed at the camera's rate and
    the model answers as fast as it can; for every frame the latest answer that was ready by then counts, and beside it
    stands the accuracy of the same model if it took no time. With --runtime-ms or --profile the device is simulated,
    so that the result can be had again. With --log and --truth a log of an earlier run (--out) is scored. A flag that
    is not read in one of these cases is refused there.

    Args:
        data: a folder, a .csv, or jhmdb, weizmann, synthetic, synthetic_shapes, synthetic_both.
        model: a name from `sidestream models`, or the folder of a saved model.
        weights: default (the library's own), random (by --seed), or a local .safetensors / .pt file.
        head: classes (one per clip), or keypoints (JHMDB's joints, or the synthetic sets' points).
        streaming: judge the model live.
        log: answers of an earlier run, to be scored against --truth.
        truth: their ground truth.
        out: folder for offline.jsonl, truth.jsonl and, judged live, answers.jsonl (not of classes judged offline).
        video: draw the true joints and the current answers of so many clips into OUT/overlay.mp4 (keypoints).
        json: file for the result.
        frame_rate: of the camera: frames are shown at this rate, whatever their recorded times.
        eta: ask for each frame's truth so many frame times before it comes; -1 asks when the next one does.
        forecast: move answers on to the moment for which they are asked, at constant velocity (keypoints and boxes).
        predictive: an answer speaks of the newest frame of its tick (a net trained to predict), not of an older one;
            for circuits whose answers are older.
        stages: number of stages that the model is cut into (default: 1; par_densenet, par_inception: their own, as
            trained by `sidestream train --rule unrolled`).
        wiring: sequential, pipelined, parallel, or semi-parallel:G.
        executor: live: auto, threads, sequential, frame-parallel, or inline.
        runtime_ms: simulated time for a frame in milliseconds, or one time for each stage.
        profile: recorded runtimes to draw from (RuntimeProfile.write).
        policy: of the simulated device: idle-free, idle-next, shrinking-tail, half-tail, half-next-tail, or unlimited
            (a device for every frame).
        seed: of random weights, and of the simulated runtimes.
        max_clips: take so many clips, evenly spread.
        split: of a data set by name: jhmdb 1, 2 or 3; weizmann the held-out actors, such as daria,eli.
        root: folder that holds the data sets by name (default: the environment variable SIDESTREAM_DATA).
        num_frames: frames of a clip, offline (default: the model's own).
        size: height and width of the frames in pixels (default: the model's own).
        frame_step: distance of a clip's frames in the video (default: the model's own).
        batch_size: clips of a batch, offline.
        threads: worker threads, live (default: all cores).
    """
    given = dict(locals())
    check_flags(given, {name: each.default for name, each in inspect.signature(evaluate).parameters.items()})
    if log is not None and truth is not None:
        result = _score_log(log, truth, eta=eta, forecast=forecast)
    else:
        result = _evaluate_model(given)
    show(result)
    if json is not None:
        from sidestream.report.record import write_text

        write_text(json, json_module.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return 0


def _score_log(log: Path, truth: Path, *, eta: float, forecast: bool) -> dict[str, Any]:
    from sidestream.evals.streaming import Boxes, Points, pair_same_frames, read_answers, read_truth

    answers, about = read_answers(log)
    truths, about_truth = read_truth(truth)
    if forecast and truths and not isinstance(truths[0].value, Points | Boxes):
        raise InputError(f"--forecast moves points and boxes, which {log} does not hold; leave it out")
    same = [p for p in pair_same_frames(truths, answers) if p.answer is not None]
    pairs = {"offline (answered frames)": same} if same else {}
    pairs |= _live_pairs(truths, answers, eta=eta, forecast=forecast)
    joints = about.get("joints") or about_truth.get("joints")
    return {"log": str(log), "about": about, **_scores(pairs, eta, joints, (truth.parent, log.parent))}


def _live_pairs(truths: Any, answers: Any, *, eta: float, forecast: bool) -> dict[str, Any]:
    """Each frame with the answer that was current then; and where asked for, with that answer's forecast."""
    from sidestream.evals.streaming import pair, with_forecast

    pairs = pair(truths, answers, eta_frames=eta)
    return {"streaming": pairs} | ({"streaming, forecast": with_forecast(pairs, answers)} if forecast else {})


def _scores(
    pairs: dict[str, Any], eta: float, joints: Any, folders: tuple[Path, Path] = (Path(), Path())
) -> dict[str, Any]:
    """Of each kind of pairs; and where some are live, what share of the first kind's figure they keep."""
    from sidestream.evals.streaming import main_figure, score

    found = {title: score(each, folders=folders) for title, each in pairs.items()}
    name, ceiling = main_figure(next(iter(found.values())))
    live: dict[str, Any] = {}
    if "streaming" in found:
        is_known = "streaming" not in next(iter(found))  # a log may have no answer to its own frames
        is_known &= ceiling >= LEAST_FIGURE
        live = {"eta": eta, "share_kept": found["streaming"][name] / ceiling if is_known else None}
    return {"metric": name, **live, "scores": found, **joint_fields(found, joints)}


def _evaluate_model(given: dict[str, Any]) -> dict[str, Any]:
    from sidestream.cli.evaluate_model import evaluate_offline, evaluate_streaming
    from sidestream.evals.streaming import pair
    from sidestream.report import machine

    plain = {n: str(v) if isinstance(v, Path) else v for n, v in given.items() if n not in ("json", "out", "video")}
    head: dict[str, Any] = {"options": plain, "machine": machine()}
    if not given["streaming"] and given["head"] == "classes":
        return head | evaluate_offline(given)
    judged, about = evaluate_streaming(given)
    head |= about
    joints = dataset_joints(given) if given["head"] == "keypoints" else None
    pairs = {"offline": pair(judged.truths, judged.offline)}
    if given["streaming"]:
        pairs |= _live_pairs(judged.truths, judged.streaming, eta=given["eta"], forecast=given["forecast"])
    scores = _scores(pairs, given["eta"], joints)
    if given["out"] is not None:
        named = {name: scores[name] for name in ("joints", "pck_normalised_by") if name in scores}
        _write(given, judged, head | named)
    if given["video"]:
        title, drawn = list(pairs.items())[-1]
        head["video"] = str(evaluation_film(drawn, given, title=title))
    if given["streaming"]:
        head |= {"latency_seconds": _latency(judged.streaming), "num_answers": len(judged.streaming)}
    return head | scores


def _latency(answers: Any) -> dict[str, float] | None:
    """From a frame's arrival to its answer: median and 95th percentile."""
    from sidestream.report.measure import percentiles

    if not answers:
        return None
    p50, p95, _ = percentiles([a.ready_seconds - a.arrived_seconds for a in answers])
    return {"p50": p50, "p95": p95}


def _write(given: dict[str, Any], judged: Any, about: dict[str, Any]) -> None:
    from sidestream.evals.streaming import write_answers, write_truth

    folder: Path = given["out"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"--out {folder}: cannot be made ({error.strerror}); give another folder") from error
    of_truth = {name: about[name] for name in ("joints",) if name in about}
    write_truth(folder / "truth.jsonl", judged.truths, about={"data": given["data"], **of_truth})
    write_answers(folder / "offline.jsonl", judged.offline, about=about)
    if given["streaming"]:
        write_answers(folder / "answers.jsonl", judged.streaming, about=about)
