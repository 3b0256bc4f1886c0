"""The families compared: every model through the same measurements, each result one record, finished ones skipped."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sidestream.errors import InputError
from sidestream.evals.causality import find_causality
from sidestream.evals.compare_forms import Forms, forms_of
from sidestream.evals.compare_memory import memory_records
from sidestream.evals.compare_speed import Runner, seconds_of
from sidestream.evals.compare_talk import family_of
from sidestream.evals.flops import clip_flops, num_parameters, stream_flops
from sidestream.models import create_model, model_info
from sidestream.report.energy import energy_meter
from sidestream.report.measure import machine

PARTS = ("params", "flops", "causality", "latency", "memory")

Record = dict[str, Any]
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Setting:
    """What every model is given alike. Batch 1, float32, random weights, random pixels."""

    num_frames: int = 16
    """Of a clip, and of a sliding window."""
    size_px: int = 112
    answer_every: int = 8
    """Frames from one answer of a sliding window to the next; a step form answers at its own rate."""
    num_classes: int = 21
    lengths: tuple[int, ...] = (8, 16, 32, 64)
    """Frames of the clips of the training memory."""
    num_repeats: int = 5
    seconds: float = 1.0
    """Of one model in one repeat, at least."""
    num_threads: int = 2
    device: str = "cpu"
    causality_size_px: int = 64


def compare(
    models: Sequence[str],
    setting: Setting,
    *,
    parts: Sequence[str] = PARTS,
    done: Iterable[Record] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Record]:
    """One record per measurement, as it is finished; those in ``done`` are not measured again.

    A model that refuses the input (or fails) gives a record with ``error``, and the others go on.
    Raises ``InputError`` for an unknown part, ``ModelError`` for an unknown model.
    """
    check_parts(parts)
    about = {name: _about(name) for name in models}
    torch.set_num_threads(setting.num_threads)
    known = {key_of(record): record for record in done}
    host, settings = machine(), asdict(setting) | {"lengths": list(setting.lengths)}
    for part in (p for p in PARTS if p in parts):
        for record in _MEASURES[part](models, setting, known, partial(_say_part, say, part)):
            yield {"part": part, **about[record["model"]], **record, "setting": settings, "machine": host}


def check_parts(parts: Sequence[str]) -> None:
    """Raises ``InputError`` for an unknown part."""
    if unknown := [part for part in parts if part not in PARTS]:
        raise InputError(f"unknown part {unknown[0]!r}; there are {', '.join(PARTS)}")


def key_of(record: Record) -> Key:
    """What a record is about: part, model, and which of its measurements."""
    return tuple(record.get(name) for name in ("part", "model", "work", "num_frames", "repeat"))


def _about(name: str) -> Record:
    info = model_info(name)
    return {"model": name, "family": family_of(name, is_image_model=info.input_spec.layout == "BCHW")}


def _each(
    part: str, measure: Callable[[nn.Module, Setting], Record]
) -> Callable[[Sequence[str], Setting, dict[Key, Record], Callable[[str], None]], Iterator[Record]]:
    """A part that looks at one model after the other."""

    def records(
        models: Sequence[str], setting: Setting, known: dict[Key, Record], say: Callable[[str], None]
    ) -> Iterator[Record]:
        for name in models:
            if key_of({"part": part, "model": name}) not in known:
                say(name)
                yield {"model": name, **_or_error(partial(_on_new_model, measure, name, setting))}

    return records


def _params(model: nn.Module, setting: Setting) -> Record:
    return {"num_parameters": num_parameters(model)}


def _flops(model: nn.Module, setting: Setting) -> Record:
    forms, clip_BTCHW = _forms(model, setting), _clip(setting, setting.size_px)
    frame_BCHW = clip_BTCHW[:, 0]
    of_clip = clip_flops(forms.clip, clip_BTCHW)
    of_window = stream_flops(forms.window, frame_BCHW)
    is_step_form = forms.stream_kind == "step form"
    of_stream = stream_flops(forms.stream, frame_BCHW, num_warm_up=setting.num_frames) if is_step_form else of_window
    return {
        "clip_flops": of_clip,
        "clip_flops_per_frame": of_clip / setting.num_frames,
        "window_flops_per_answer": of_window,
        "window_flops_per_frame": of_window / setting.answer_every,
        **_stream_facts(forms),
        "stream_flops_per_answer": of_stream,
        "stream_flops_per_frame": of_stream / forms.stream.period_ticks,
    }


def _causality(model: nn.Module, setting: Setting) -> Record:
    found = find_causality(_forms(model, setting), _clip(setting, setting.causality_size_px))
    return {**asdict(found), "num_frames": None, "num_frames_poisoned": found.num_frames}


def _latency(
    models: Sequence[str], setting: Setting, known: dict[Key, Record], say: Callable[[str], None]
) -> Iterator[Record]:
    """All models in turn, in an order of its own in each repeat."""
    runners: dict[str, tuple[Forms, Runner]] = {}
    meter = energy_meter(setting.device)
    for repeat in range(1, setting.num_repeats + 1):
        names = [n for n in models if key_of({"part": "latency", "model": n, "repeat": repeat}) not in known]
        random.Random(repeat).shuffle(names)
        for name in names:
            if key_of({"part": "latency", "model": name, "repeat": None}) in known:
                continue  # it failed before
            say(f"{name}, repeat {repeat} of {setting.num_repeats}")
            if name not in runners:
                ready = _or_error(partial(_ready, name, setting, meter))
                if "error" in ready:
                    known[key_of({"part": "latency", "model": name})] = ready
                    yield {"model": name, **ready}
                    continue
                runners[name] = ready["ready"]
            forms, runner = runners[name]
            speed = asdict(runner.measure(setting.seconds))
            of_clip = partial(forms.clip, _clip(setting, setting.size_px))
            speed["clip_seconds"] = seconds_of(of_clip, num_repeats=1, device=setting.device)
            facts = {**_stream_facts(forms), "energy_source": None if meter is None else meter.source}
            yield {
                "model": name,
                "repeat": repeat,
                **speed,
                "num_frames": None,
                "num_frames_fed": speed["num_frames"],
            } | facts


def _on_new_model(measure: Callable[[nn.Module, Setting], Record], name: str, setting: Setting) -> Record:
    return measure(_made(name, setting), setting)


def _say_part(say: Callable[[str], None], part: str, text: str) -> None:
    say(f"{part}: {text}")


def _ready(name: str, setting: Setting, meter: Any) -> Record:
    return {"ready": _runner(name, setting, meter)}


def _runner(name: str, setting: Setting, meter: Any) -> tuple[Forms, Runner]:
    forms = _forms(_made(name, setting), setting)
    runner = Runner(forms.stream, _clip(setting, setting.size_px)[:, 0], meter)
    is_step_form = forms.stream_kind == "step form"
    runner.warm_up(setting.num_frames if is_step_form else 1)
    return forms, runner


def _stream_facts(forms: Forms) -> Record:
    return {
        "stream_kind": forms.stream_kind,
        "stream_period_ticks": forms.stream.period_ticks,
        "stream_delay_ticks": forms.stream.delay_ticks,
    }


def _made(name: str, setting: Setting) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, num_classes=setting.num_classes).to(setting.device)


def _forms(model: nn.Module, setting: Setting) -> Forms:
    return forms_of(model, num_frames=setting.num_frames, answer_every=setting.answer_every)


def _clip(setting: Setting, size_px: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (1, setting.num_frames, 3, size_px, size_px)
    return (torch.rand(shape, generator=generator) * 2 - 1).to(setting.device)


def _or_error(work: Callable[[], Record]) -> Record:
    try:
        return work()
    except Exception as error:  # each library refuses in its own way
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _memory(
    models: Sequence[str], setting: Setting, known: dict[Key, Record], say: Callable[[str], None]
) -> Iterator[Record]:
    for name in models:
        yield from memory_records(name, setting, known, say)


_MEASURES: dict[str, Callable[..., Iterator[Record]]] = {
    "params": _each("params", _params),
    "flops": _each("flops", _flops),
    "causality": _each("causality", _causality),
    "latency": _latency,
    "memory": _memory,
}
