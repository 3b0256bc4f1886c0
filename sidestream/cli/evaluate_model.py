"""The model's side of ``sidestream evaluate``: from flags to a model, its data, and its answers."""

from __future__ import annotations

from typing import Any

from sidestream.cli.evaluate import FRAMES_OF_FRAME_MODELS
from sidestream.cli.evaluate_flags import check_num_outputs
from sidestream.errors import CutError, InputError, LayoutError, WeightsError
from sidestream.types import InputSpec


def evaluate_offline(given: dict[str, Any]) -> dict[str, Any]:
    """One answer per clip; top-1 of the test part."""
    from sidestream.data import ClipOptions, Loader, open_dataset
    from sidestream.train.answering import Answering, check_model
    from sidestream.train.evaluate import evaluate
    from sidestream.train.tasks import ClassTask

    spec = spec_of(given)
    dataset = open_dataset(
        given["data"], part="test", split=given["split"], root=given["root"], spec=spec, options=ClipOptions()
    )
    most, records = given["max_clips"], dataset.records
    if most is not None and most < len(records):
        dataset.records = tuple(records[n * len(records) // most] for n in range(most))
    net = Answering(_model(given, dataset.num_classes))
    loader = Loader(dataset, batch_size=given["batch_size"])
    clip_BTCHW = next(loader.batches(0)).clip_BTCHW[:1]
    check = ClassTask().check_answers
    check_model(net, clip_BTCHW, lambda _, answers: check(given["model"], answers, clip_BTCHW, dataset.num_classes))
    found = evaluate(net, loader.batches(0))
    per_class = {dataset.class_names[label]: list(counts) for label, counts in found.per_class.items()}
    return {
        "metric": "top_1",
        "accuracy": found.accuracy,
        "num_correct": found.num_correct,
        "num_records": found.num_records,
        "loss": found.loss,
        "per_class": per_class,
        "skipped": dataset.skipped,
    }


def evaluate_streaming(given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Every frame of the test clips, offline and (with --streaming) live; and what the circuit is."""
    from sidestream.circuit.ages import latency_ticks, look_ahead_ticks
    from sidestream.data import open_dataset
    from sidestream.evals.streaming.judge import classes_answer, judge, points_answer
    from sidestream.evals.streaming.labelled import labelled_clips, num_points
    from sidestream.models import info_of

    device = _device(given)
    spec = spec_of(given)
    dataset = open_dataset(given["data"], part="test", split=given["split"], root=given["root"], spec=spec)
    is_points = given["head"] == "keypoints"
    net: Any = _model(given, num_points(dataset) if is_points else dataset.num_classes)
    info = info_of(net)
    assert info is not None  # create_model hangs one on every model
    circuit, spec = _circuit(given, net, info, spec)
    if given["predictive"] and latency_ticks(circuit) + look_ahead_ticks(circuit) == 0:
        raise InputError(
            f"--predictive: no answer of this circuit is older than its frame (--wiring {circuit.wiring}, "
            f"stages: {circuit.num_stages}), so nothing has to predict; leave it out, or give --stages 2 or more and "
            "--wiring parallel"
        )
    if device is not None:
        device.schedule(circuit, 1, 0)  # refuses runtimes that do not fit before the work
    clips = labelled_clips(dataset, given["head"], frame_rate=given["frame_rate"], max_clips=given["max_clips"])
    judged = judge(
        circuit,
        clips,
        answer=points_answer(spec) if is_points else classes_answer(),
        device=device,
        streaming=given["streaming"],
        judged_frame="newest" if given["predictive"] else "answered",
        prepare=spec,
        executor=given["executor"],
        num_threads=given["threads"],
    )
    about = {
        "num_clips": judged.num_clips,
        "circuit": {
            "num_stages": circuit.num_stages,
            "wiring": circuit.wiring,
            "latency_ticks": latency_ticks(circuit),
        },
        "is_simulated": device is not None,
    }
    return judged, about


def _circuit(given: dict[str, Any], net: Any, info: Any, spec: InputSpec) -> tuple[Any, InputSpec]:
    """The net in the stages that it has by itself, or cut; and what a frame is prepared by."""
    import torch

    from sidestream.circuit.cut import cut
    from sidestream.circuit.net_stages import net_circuit
    from sidestream.circuit.wiring import wire
    from sidestream.models.depth_net import DepthNet
    from sidestream.models.on_stream import net_on_stream

    example = torch.rand(1, 3, *spec.size_px, generator=torch.Generator().manual_seed(0))
    if given["stages"] is None and isinstance(net, DepthNet) and spec.frame_step == 1:
        fed = spec.replace(layout="BCHW", num_frames=1, min_frames=None)
        return net_circuit(net.eval(), example, given["wiring"]), fed
    if info.input_spec.layout == "BTCHW":
        net, info = net_on_stream(net, _with_spec(info, spec))
        spec = info.input_spec
    try:
        stages = cut(net.eval(), example, num_stages=given["stages"] or 1)
    except CutError as error:
        if isinstance(error.__cause__, LayoutError):  # frames that the net does not take
            raise error.__cause__ from None
        raise
    return wire(stages, given["wiring"]), spec


def _model(given: dict[str, Any], num_outputs: int) -> Any:
    from sidestream.models import create_model
    from sidestream.train.hardware import seed_all

    check_num_outputs(given, num_outputs)
    seed_all(given["seed"])  # of random weights
    try:
        return create_model(
            given["model"],
            num_classes=num_outputs,
            weights=None if given["weights"] == "random" else given["weights"],
            head=given["head"],
        )
    except WeightsError as error:
        raise WeightsError(f"{given['model']}: {error}") from error


def spec_of(given: dict[str, Any]) -> InputSpec:
    """What the model wants, with the sizes that were given instead."""
    own = _own_spec(given["model"])

    def chosen(name: str, default: int) -> int:
        return default if given[name] is None else given[name]

    is_clip_model = own.layout == "BTCHW"
    return own.replace(
        num_frames=chosen("num_frames", own.num_frames if is_clip_model else FRAMES_OF_FRAME_MODELS),
        frame_step=chosen("frame_step", own.frame_step),
        size_px=own.size_px if given["size"] is None else (given["size"], given["size"]),
        resize_px=own.resize_px if given["size"] is None else None,
    )


def _own_spec(model: str) -> InputSpec:
    """Of a name, or of a saved model's folder."""
    from sidestream.models import info_of
    from sidestream.models.create import is_saved, model_info
    from sidestream.models.pretrained import from_pretrained

    info = info_of(from_pretrained(model)) if is_saved(model) else model_info(model)
    assert info is not None  # from_pretrained hangs one on every model
    return info.input_spec


def _with_spec(info: Any, spec: InputSpec) -> Any:
    from dataclasses import replace

    return replace(info, input_spec=spec)


def _device(given: dict[str, Any]) -> Any:
    from sidestream.evals.streaming.runtimes import RuntimeProfile
    from sidestream.evals.streaming.simulated import SimulatedDevice, constant_profile

    if given["runtime_ms"]:
        found = constant_profile(given["runtime_ms"])
    elif given["profile"] is not None:
        found = RuntimeProfile.read(given["profile"])
    else:
        return None
    return SimulatedDevice(found, given["frame_rate"], policy=given["policy"], seed=given["seed"])
