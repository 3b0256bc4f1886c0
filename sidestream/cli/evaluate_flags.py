"""Which flags ``sidestream evaluate`` reads in which mode; and what is refused before any work."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from sidestream.cli.early import check_out_file, check_out_folder
from sidestream.cli.evaluate_film import check_video
from sidestream.errors import InputError, ModelError

MODES = {
    "log": "an earlier run is scored",
    "classes": "classes are judged offline",
    "keypoints": "keypoints are judged offline",
    "live": "a model is judged live on this machine's clock",
    "simulated": "a device is simulated",
}
"""What a call can be, and how it is called in a message."""

_JUDGED = "classes keypoints live simulated"
_BY_FRAME = "keypoints live simulated"
_WITH_TIME = "live simulated"
READ_IN = {
    "log": "log",
    "truth": "log",
    "json": f"log {_JUDGED}",
    "data": _JUDGED,
    "model": _JUDGED,
    "weights": _JUDGED,
    "head": _JUDGED,
    "split": _JUDGED,
    "root": _JUDGED,
    "size": _JUDGED,
    "num_frames": _JUDGED,
    "frame_step": _JUDGED,
    "max_clips": _JUDGED,
    "seed": _JUDGED,
    "batch_size": "classes",
    "out": _BY_FRAME,
    "video": _BY_FRAME,
    "frame_rate": _BY_FRAME,
    "stages": _BY_FRAME,
    "wiring": _BY_FRAME,
    "predictive": _BY_FRAME,
    "streaming": _WITH_TIME,
    "eta": f"log {_WITH_TIME}",
    "forecast": f"log {_WITH_TIME}",
    "executor": "live",
    "threads": "live",
    "runtime_ms": "simulated",
    "profile": "simulated",
    "policy": "simulated",
}
"""Flag -> the modes that read it. The seed is of random weights, of a fresh head, and of simulated runtimes."""
LEAST = {"seed": 0, "eta": -1} | dict.fromkeys(
    ("stages", "size", "num_frames", "frame_step", "max_clips", "batch_size", "threads"), 1
)


def check_flags(given: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raises ``InputError`` for flags that do not go together or have no sense, ``WriteError`` for output paths."""
    if (given["log"] is None) != (given["truth"] is None):
        raise InputError("--log and --truth belong together; give both, or neither")
    if given["log"] is None and (missing := [f"--{name}" for name in ("data", "model") if given[name] is None]):
        raise InputError(f"{', '.join(missing)} missing; give --data and --model, or --log and --truth")
    check_video(given)
    _check_read(given, defaults)
    _check_values(given)
    if given["json"] is not None:
        check_out_file("--json", given["json"])
    if given["out"] is not None:
        check_out_folder("--out", given["out"])
    if given["log"] is None:
        _check_names(given)
        _check_model(given)


def mode_of(given: dict[str, Any]) -> str:
    """One of ``MODES``."""
    if given["log"] is not None:
        return "log"
    if not given["streaming"]:
        return str(given["head"])
    return "simulated" if given["runtime_ms"] or given["profile"] is not None else "live"


def _check_read(given: dict[str, Any], defaults: dict[str, Any]) -> None:
    mode = mode_of(given)
    changed = [name for name in READ_IN if given[name] != defaults[name]]
    unread = [name for name in changed if mode not in READ_IN[name].split()]
    is_random = given["weights"] == "random" or given["head"] == "keypoints"  # a fresh head on a model of classes
    if "seed" in changed and mode != "simulated" and not is_random and "seed" not in unread:
        unread.append("seed")
    if not unread:
        return
    modes = [set(READ_IN[name].split()) for name in unread]
    hint = ""
    if mode in ("classes", "keypoints") and all("live" in each or "simulated" in each for each in modes):
        hint = ", or add --streaming"
    elif mode == "live" and all("simulated" in each for each in modes):
        hint = ", or add --runtime-ms or --profile"
    names = ", ".join(f"--{name.replace('_', '-')}" for name in unread)
    it = "it" if len(unread) == 1 else "them"
    raise InputError(f"{names}: nothing reads {it} where {MODES[mode]}; leave {it} out{hint}")


def _check_values(given: dict[str, Any]) -> None:
    for name, least in LEAST.items():
        if given[name] is not None and not given[name] >= least:
            raise InputError(f"--{name.replace('_', '-')} {given[name]}; give {least} or more")
    if not 0 < given["frame_rate"] < math.inf:
        raise InputError(f"--frame-rate {given['frame_rate']}; give frames per second above 0")
    for runtime in given["runtime_ms"]:
        if not 0 <= runtime < math.inf:
            raise InputError(f"--runtime-ms {runtime:g}; give milliseconds, 0 or more")
    if given["runtime_ms"] and given["profile"] is not None:
        raise InputError("--runtime-ms and --profile were given; simulate one device, so leave one of them out")
    if given["forecast"] and given["log"] is None and given["head"] == "classes":
        raise InputError("--forecast moves points and boxes, but --head is classes; leave it out")


def _check_names(given: dict[str, Any]) -> None:
    from sidestream.circuit.wiring import WIRINGS
    from sidestream.engine import EXECUTORS
    from sidestream.evals.streaming.schedule import POLICIES
    from sidestream.evals.streaming.simulated import UNLIMITED

    known = {
        "policy": (given["policy"], (*POLICIES, UNLIMITED)),
        "executor": (given["executor"], EXECUTORS),
        "wiring": (given["wiring"].partition(":")[0].replace("_", "-"), (*WIRINGS, "semi-parallel")),
    }
    for name, (word, names) in known.items():
        if word not in names:
            raise InputError(f"unknown {name} {given[name]!r}; expected one of {', '.join(names)}")


def _check_model(given: dict[str, Any]) -> None:
    """That there is such a model, and that it answers what is asked for; without making it."""
    from sidestream.models import create

    name, weights, head = given["model"], given["weights"], given["head"]
    if create.is_saved(name):
        if weights != "default":
            raise InputError(f"{name!r} has its own weights, but --weights {weights} was given; leave it out")
        if os.path.isdir(name) and (answers := _saved_config(name)["head"]) != head:
            raise _wrong_head(repr(name), answers)
        _check_seed(given)
        return
    try:
        create.check_model(name)
    except ModelError as error:
        if os.path.isdir(name):
            raise InputError(
                f"the folder {name!r} holds no saved model (it has no config.json), and no model has that name; give "
                "a folder of save_pretrained, or a name from 'sidestream models'"
            ) from error
        raise
    answers = create.model_info(name).task
    if answers == "pictures" or (answers == "keypoints" and head == "classes"):
        raise _wrong_head(name, answers)
    if answers == head and weights != "random":
        _check_seed(given)
    create.check_model(name, weights)


def _check_seed(given: dict[str, Any]) -> None:
    """Of a model with its own weights and head."""
    if given["seed"] and mode_of(given) != "simulated":
        raise InputError(
            f"--seed: nothing is drawn by it, as {given['model']} has its own weights and head; leave it out"
        )


def check_num_outputs(given: dict[str, Any], wanted: int) -> None:
    """Raises ``InputError`` where a saved model answers another number of classes or points than the data has."""
    if os.path.isdir(given["model"]) and (Path(given["model"]) / "config.json").is_file():
        found = _saved_config(given["model"])["num_classes"]
        if found != wanted:
            head = given["head"]
            raise InputError(
                f"{given['model']!r} answers {found} {head}, but {given['data']} has {wanted}; "
                "evaluate it on data like that of its training"
            )


def _wrong_head(model: str, answers: str) -> InputError:
    if answers in ("classes", "keypoints"):
        return InputError(f"{model} answers {answers}; give --head {answers}")
    return InputError(f"{model} answers {answers}, which evaluate cannot judge; give a model of classes or keypoints")


def _saved_config(folder: str) -> dict[str, Any]:
    from sidestream.models.saved_config import read_config

    return read_config(Path(folder))
