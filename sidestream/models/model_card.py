"""The README of a saved model: what it is, what it wants to be fed in words, how to load it, how well it did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sidestream.models.info import ModelInfo
from sidestream.types import InputSpec

LIBRARY = "sidestream"
TAGS = ("video", "streaming")
_PIPELINES = {"image": "image-classification", "clip": "video-classification", "segmentation": "image-segmentation"}

_USE_CLIP = """clip_BTCHW = ss.prepare(ss.read("clip.mp4"), ss.input_spec_of(model)){picked}
logits_BN = model(clip_BTCHW)"""
_USE_FRAME = """for frame in ss.stream("clip.mp4"):
    answer = model(ss.prepare(frame, ss.input_spec_of(model)))"""


def card_metadata(info: ModelInfo, license_id: str) -> dict[str, Any]:
    """The fields of the card's head, as the hub knows them."""
    fields = {"license": license_id, "library_name": LIBRARY, "tags": [*TAGS, info.name.rpartition("/")[2]]}
    pipeline = _PIPELINES.get(info.task)
    return fields if pipeline is None else fields | {"pipeline_tag": pipeline}


def card_text(info: ModelInfo, *, version: str, metrics: Mapping[str, Any], note: str) -> str:
    """The card below its head, as Markdown."""
    what = "classes" if info.task in ("image", "clip", "segmentation") else info.task
    parts = [
        f"# {info.name}, {info.num_classes} {what}",
        f"A model of the library Sidestream, saved by its version {version}.",
        note.strip(),
        "## Input",
        "\n".join(f"- {line}" for line in spec_in_words(info.input_spec)),
        "## Use",
        _use(info),
        "## Results" if metrics else "",
        _table(metrics) if metrics else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def spec_in_words(spec: InputSpec) -> list[str]:
    """What a model wants to be fed, one sentence per line."""
    height, width = spec.size_px
    resize = f"resized to {height} x {width} pixels (height x width), whatever its shape"
    if spec.resize_px is not None:
        resize = (
            f"resized until its shorter side is {spec.resize_px} pixels, then the middle {height} x {width} cut out"
        )
    lines = [
        *_length_in_words(spec),
        f"Each frame is {resize}; {spec.interpolation}, anti-aliased.",
        f"Values are RGB in [0, 1], less the mean {_triple(spec.mean)}, divided by {_triple(spec.std)}.",
        "No answer depends on later frames (causal)." if spec.causal else "Answers may depend on later frames.",
    ]
    if spec.delay_ticks:
        lines.append(f"On a stream, answers come {spec.delay_ticks} frames after the frame they belong to.")
    return lines


def _length_in_words(spec: InputSpec) -> list[str]:
    if spec.layout == "BCHW":
        return ["Single frames, axes (batch, 3, height, width)."]
    lines = [f"Clips of {spec.num_frames} frames, axes (batch, frames, 3, height, width)."]
    if spec.min_frames is not None:
        lines.append(f"Any other number of frames from {spec.min_frames} on is taken too.")
    if spec.frame_step != 1:
        lines.append(f"Of the video, one frame in {spec.frame_step} is used.")
    return lines


def _use(info: ModelInfo) -> str:
    spec, use = info.input_spec, _USE_FRAME
    if spec.layout == "BTCHW":
        picked = f"[:, ::{spec.frame_step}]" if spec.frame_step != 1 else ""
        use = _USE_CLIP.format(picked=picked + (f"[:, :{spec.num_frames}]" if spec.min_frames is None else ""))
    load = 'model = ss.from_pretrained("path/to/this/folder")  # or its name on the hub, "USER/NAME"'
    return f"```python\nimport sidestream as ss\n\n{load}\n{use}\n```"


def _table(metrics: Mapping[str, Any]) -> str:
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in metrics.items()]
    return "\n".join(["| measure | value |", "|---|---|", *rows])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _triple(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"
