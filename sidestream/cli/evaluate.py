"""``sidestream evaluate``: how good a model is on labelled clips, offline and judged live; or what a log is worth."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Any, Literal

from sidestream.errors import InputError

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
    so that the result can be had again. With --log and --truth a log of an earlier run (--out) is scored.

    Args:
        data: a folder, a .csv, or jhmdb, weizmann, synthetic, synthetic_shapes, synthetic_both.
        model: a name from `sidestream models`, or the folder of a saved model.
        weights: default (the library's own), random, or a local .safetensors / .pt file.
        head: classes (one per clip), or keypoints (JHMDB's joints, or the synthetic sets' points).
        streaming: judge the model live.
        log: answers of an earlier run, to be scored against --truth.
        truth: their ground truth.
        out: folder for answers.jsonl, offline.jsonl and truth.jsonl of a streaming run.
        json: file for the result.
        frame_rate: of the camera: frames are shown at this rate, whatever their recorded times.
        eta: ask for each frame's truth so many frame times before it comes; -1 asks when the next one does.
        forecast: move answers on to the moment for which they are asked, at constant velocity (keypoints and boxes).
        predictive: an answer speaks of the newest frame of its tick (a net trained to predict), not of an older one.
        stages: number of stages that the model is cut into (default: 1; par_densenet, par_inception: their own, as
            trained by `sidestream train --rule unrolled`).
        wiring: sequential, pipelined, parallel, or semi-parallel:G.
        executor: auto, threads, sequential, frame-parallel, or inline.
        runtime_ms: simulated time for a frame in milliseconds, or one for each stage.
        profile: recorded runtimes to draw from (RuntimeProfile.write).
        policy: of the simulated device: idle-free, idle-next, shrinking-tail, half-tail, half-next-tail, or unlimited
            (a device for every frame).
        seed: of the simulated runtimes.
        max_clips: take so many clips, evenly spread.
        split: of a data set by name: jhmdb 1, 2 or 3; weizmann the held-out actors, such as daria,eli.
        root: folder that holds the data sets by name (default: the environment variable SIDESTREAM_DATA).
        num_frames: frames of a clip, offline (default: the model's own).
        size: height and width of the frames in pixels (default: the model's own).
        frame_step: distance of a clip's frames in the video (default: the model's own).
        batch_size: clips of a batch, offline.
        threads: worker threads (default: all cores).
    """
    given = dict(locals())
    if (log is None) != (truth is None):
        raise InputError("--log and --truth belong together; give both, or neither")
    if log is not None and truth is not None:
        if data is not None or model is not None:
            raise InputError("--log scores an earlier run; leave out --data and --model")
        result = _score_log(log, truth, eta=eta, forecast=forecast)
    else:
        result = _evaluate_model(given)
    _show(result)
    if json is not None:
        from sidestream.report.record import write_text

        write_text(json, json_module.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return 0


def _score_log(log: Path, truth: Path, *, eta: float, forecast: bool) -> dict[str, Any]:
    from sidestream.evals.streaming import read_answers, read_truth

    answers, about = read_answers(log)
    truths, _ = read_truth(truth)
    folders = (truth.parent, log.parent)
    return {"log": str(log), "about": about, **_scores(truths, answers, None, (eta, forecast), folders)}


def _scores(
    truths: Any, answers: Any, offline: Any, options: tuple[float, bool], folders: tuple[Path, Path] = (Path(), Path())
) -> dict[str, Any]:
    """Offline and streaming, and with a forecast where asked for. Without ``offline``: of the frames answered live."""
    from sidestream.evals.streaming import main_figure, pair, pair_same_frames, score, with_forecast

    eta, forecast = options
    if offline is None:
        same = [p for p in pair_same_frames(truths, answers) if p.answer is not None]
        found = {"offline (answered frames)": score(same, folders=folders)} if same else {}
    else:
        found = {"offline": score(pair(truths, offline), folders=folders)}
    pairs = pair(truths, answers, eta_frames=eta)
    found["streaming"] = score(pairs, folders=folders)
    if forecast:
        found["streaming, forecast"] = score(with_forecast(pairs, answers), folders=folders)
    name = main_figure(found["streaming"])[0]
    ceiling = next(iter(found.values()))[name]
    kept = found["streaming"][name] / ceiling if ceiling > 0 else None
    return {"metric": name, "eta": eta, "share_kept": kept, "scores": found}


def _evaluate_model(given: dict[str, Any]) -> dict[str, Any]:
    from sidestream.cli.evaluate_model import evaluate_offline, evaluate_streaming
    from sidestream.report import machine

    missing = [f"--{name}" for name in ("data", "model") if given[name] is None]
    if missing:
        raise InputError(f"{', '.join(missing)} missing; give --data and --model, or --log and --truth")
    plain = {n: str(v) if isinstance(v, Path) else v for n, v in given.items() if n not in ("json", "out")}
    head: dict[str, Any] = {"options": plain, "machine": machine()}
    if not given["streaming"] and given["head"] == "classes":
        return head | evaluate_offline(given)
    judged, about = evaluate_streaming(given)
    head |= about
    if not given["streaming"]:
        from sidestream.evals.streaming import main_figure, pair, score

        found = {"offline": score(pair(judged.truths, judged.offline))}
        return head | {"metric": main_figure(found["offline"])[0], "scores": found}
    if given["out"] is not None:
        _write(given["out"], judged, head)
    head["latency_seconds"] = _latency(judged.streaming)
    head["num_answers"] = len(judged.streaming)
    return head | _scores(judged.truths, judged.streaming, judged.offline, (given["eta"], given["forecast"]))


def _latency(answers: Any) -> dict[str, float] | None:
    """From a frame's arrival to its answer: median and 95th percentile."""
    from sidestream.report.measure import percentiles

    if not answers:
        return None
    p50, p95, _ = percentiles([a.ready_seconds - a.arrived_seconds for a in answers])
    return {"p50": p50, "p95": p95}


def _write(folder: Path, judged: Any, about: dict[str, Any]) -> None:
    from sidestream.evals.streaming import write_answers, write_truth

    folder.mkdir(parents=True, exist_ok=True)
    write_truth(folder / "truth.jsonl", judged.truths, about={"data": about["options"]["data"]})
    write_answers(folder / "answers.jsonl", judged.streaming, about=about)
    write_answers(folder / "offline.jsonl", judged.offline, about=about)


def _show(result: dict[str, Any]) -> None:
    from sidestream.report.table import markdown_table

    if "scores" not in result:
        print(f"{result['metric']} {result['accuracy']:.4f} ({result['num_correct']} of {result['num_records']} clips)")
        return
    name = result["metric"]
    columns = ("num_frames", "in_time", "miss", "mismatch")
    rows = [
        (title, f"{scores[name]:.4f}", *(scores[column] for column in columns))
        for title, scores in result["scores"].items()
    ]
    print(markdown_table(("", name, "frames", "in time", "miss", "mismatch"), rows), end="")
    if (latency := result.get("latency_seconds")) is not None:
        how = "simulated" if result["is_simulated"] else "on this machine"
        print(f"{result['num_answers']} answers, median latency {1e3 * latency['p50']:.1f} ms, {how}")
    if result.get("share_kept") is not None:
        print(f"judged live, {100 * result['share_kept']:.1f} % of the offline figure is kept")
