"""From the flags of a command to a circuit that is ready to run: model, cut, back end, wiring, executor."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidestream.errors import InputError, ModelError
from sidestream.report.words import counted
from sidestream.types import InputSpec

if TYPE_CHECKING:
    from sidestream.circuit.wire import Circuit
    from sidestream.engine.tune import Tuned


@dataclass(frozen=True)
class ModelFlags:
    """Which model, and how it is cut and run."""

    model: str
    weights: str = "default"
    labels: Path | None = None
    num_classes: int | None = None
    stages: str = "auto"
    cut: tuple[str, ...] = ()
    wiring: str = "pipelined"
    executor: str = "auto"
    backend: str = "eager"
    threads: int | None = None
    head: str = "classes"
    no_cache: bool = False
    takes_points: bool = False
    """Whether the command can do with keypoints as answers."""


@dataclass(frozen=True)
class Plan:
    """A circuit ready to run, and what the closing table says of it."""

    circuit: Circuit
    executor: str
    backend: str
    labels: tuple[str, ...] | None
    note: str = ""
    input_spec: InputSpec = field(default_factory=InputSpec)
    has_points: bool = False
    """Answers are heat maps of keypoints, not logits of classes."""
    least_frames: int = 1
    """Frames of the shortest video to which there is an answer."""
    tuned: Tuned | None = None
    """What was measured, or kept from an earlier start, where the plan was chosen so."""


def check_flags(flags: ModelFlags) -> None:
    """Raises ``InputError`` for what is wrong with the flags alone, before a model is made."""
    parse_num_stages(flags.stages)
    if flags.threads is not None and flags.threads < 1:
        raise InputError(f"--threads {flags.threads}; expected 1 or more")
    from sidestream.engine import EXECUTORS
    from sidestream.engine.backends import BACKENDS, require_backend
    from sidestream.models.create import check_model

    _one_of("executor", flags.executor, EXECUTORS)
    _one_of("backend", flags.backend, (*BACKENDS, "auto"))
    if flags.backend != "auto":
        require_backend(flags.backend)
    else:
        _check_free_to_choose(flags)
    check_model(flags.model, flags.weights, flags.labels)


def make_plan(flags: ModelFlags, *, frame_rate: float | None = None, on_progress: Any = None) -> Plan:
    """Load, cut, convert and wire; with an automatic executor or back end, measure and pick.

    ``frame_rate``: of a live source, for which latency counts; None where only throughput does.
    """
    import torch

    from sidestream.circuit.cut import cut
    from sidestream.circuit.wiring import wire
    from sidestream.engine.backends import compile_stages, cut_for_backend
    from sidestream.engine.tune import tune
    from sidestream.models.on_stream import net_on_stream, shortest

    check_flags(flags)
    num_stages = parse_num_stages(flags.stages)
    say = on_progress or (lambda text: None)
    say(f"loading {flags.model}")
    whole, own = _load(flags)
    model, info = net_on_stream(whole, own)
    least = shortest(whole, own)
    labels, spec, has_points = info.labels, info.input_spec, info.task == "keypoints"
    example = torch.rand(1, 3, *spec.size_px, generator=torch.Generator().manual_seed(0))
    name = flags.model.rpartition("/")[2]
    if flags.backend == "auto" or (flags.executor == "auto" and flags.wiring == "pipelined" and not flags.cut):
        tuned = tune(
            model,
            example,
            num_stages=num_stages,
            backends=flags.backend,
            num_threads=flags.threads,
            frame_rate=frame_rate,
            remembers=not flags.no_cache,
            on_progress=say,
        )
        circuit = tuned.circuit.replace(name=name, input_spec=spec)
        return Plan(circuit, tuned.executor, tuned.backend, labels, tuned.reason, spec, has_points, least, tuned)
    say(f"cutting {flags.model} for {flags.backend}: measuring what its layers cost")
    cut_options: dict[str, Any] = {
        "num_stages": num_stages,
        "name": name,
        "input_spec": spec,
        "num_workers": flags.threads,
    }
    if flags.cut or flags.backend == "eager":
        stages = compile_stages(cut(model, example, cut=flags.cut or None, **cut_options), flags.backend)
    else:
        stages = cut_for_backend(model, example, flags.backend, **cut_options)
    return Plan(wire(stages, flags.wiring), flags.executor, flags.backend, labels, "", spec, has_points, least)


def report_choice(console: Any, plan: Plan, choice: Any) -> None:
    """Print what was tried, and why what was picked: before the run (``plan``), or by it (its ``choice``)."""
    from sidestream.report.table import choice_table

    tuned = plan.tuned
    trials = tuned.trials if tuned else choice.trials if choice else ()
    if len(trials) > 1:
        setting = f"{tuned.backend} in {counted(tuned.circuit.num_stages, 'stage')}, " if tuned else ""
        console.print(choice_table(trials, f"{setting}{(tuned or choice).executor}"))
    if reason := plan.note or (choice.reason if choice else ""):
        kept = " (found at an earlier start; --no-cache measures anew)" if tuned and tuned.is_kept else ""
        console.print(f"picked: {reason}{kept}", highlight=False, markup=False)


def load_model(flags: ModelFlags) -> tuple[Any, tuple[str, ...] | None, InputSpec]:
    """The model as it runs on a stream, its labels and its input spec; refuses models that answer no classes."""
    from sidestream.models.on_stream import net_on_stream

    model, info = net_on_stream(*_load(flags))
    return model, info.labels, info.input_spec


def _load(flags: ModelFlags) -> tuple[Any, Any]:
    """The model and its info; refuses models whose answers the command cannot show."""
    from sidestream.models import create_model, info_of

    model: Any = create_model(
        flags.model,
        num_classes=flags.num_classes,
        weights=None if flags.weights == "random" else flags.weights,
        labels=flags.labels,
        head=flags.head,  # type: ignore[arg-type]
    )
    info = info_of(model)
    assert info is not None  # create_model hangs one on every model
    if info.task not in ("image", "clip") and not (info.task == "keypoints" and flags.takes_points):
        known = "classes of a frame or keypoints" if flags.takes_points else "classes of a frame"
        raise ModelError(
            f"{flags.model} answers with {info.task}, not with {known}; use the Python API (sidestream.run)"
        )
    return model, info


def parse_num_stages(text: str) -> int | str:
    """The flag ``--stages``: a number from 1 on, or "auto"."""
    if text == "auto":
        return text
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise InputError(f"--stages {text!r}; expected a number from 1 on, or auto")


def _one_of(flag: str, given: str, known: Any) -> None:
    if given not in known:
        raise InputError(f"unknown {flag} {given!r}; expected one of {', '.join(known)}")


def _check_free_to_choose(flags: ModelFlags) -> None:
    if flags.backend == "auto" and (flags.cut or flags.wiring != "pipelined" or flags.executor != "auto"):
        raise InputError(
            "--backend auto measures and picks executor and cut too; leave out --cut, --wiring and --executor, "
            "or name the back end"
        )
