"""Maps of par_inception's frozen Kinetics-400 trunk for JHMDB's clips with joints, made once and kept, clip by clip.

    SIDESTREAM_DATA=... python recipes/inception_features.py       # what is there is not made again

The trunk is causal, has no skips and no feedback, so that in every wiring a frame has the same map, only later:
``inception_keypoints.py`` needs nothing else to train heads for all of them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sidestream.data import ClipDataset, ClipRecord, open_dataset
from sidestream.evals.streaming.labelled import LabelledClip, labelled_clips
from sidestream.models import create_model, model_info
from sidestream.models.depth_net import DepthNet
from sidestream.models.weights import load_state
from sidestream.report.record import write_beside
from sidestream.types import Clip, InputSpec
from sidestream.video import prepare

FOLDER = Path(__file__).parent / "inception_keypoints"
MODEL, NUM_JOINTS, NUM_FRAMES = "par_inception", 15, 24
SIZE_PX = (128, 160)
"""JHMDB's 120 x 160 pixels, nothing cut off, stretched by 1/15 in height: the head takes multiples of 32."""
WEIGHTS = "i3d_kinetics400/i3d_rgb_kinetics400_piergiaj_keys.pt"


@dataclass(frozen=True, slots=True)
class ClipMaps:
    """The first frames of a clip, as the trunk sees them, and where the joints are."""

    name: str
    maps_TCHW: Tensor
    """float16."""
    points_TP2_px: Tensor
    """In pixels of the video's own frames."""


def spec() -> InputSpec:
    return model_info(MODEL).input_spec.replace(size_px=SIZE_PX, resize_px=None)


def net_on_kinetics() -> DepthNet:
    """par_inception with a fresh head for keypoints, its trunk loaded from the I3D file, strictly; in eval mode."""
    whole = create_model(MODEL, num_classes=400, weights=Path(os.environ["SIDESTREAM_DATA"]) / WEIGHTS)
    net = create_model(MODEL, num_classes=NUM_JOINTS, head="keypoints")
    trunk = {key: value for key, value in whole.state_dict().items() if not key.startswith("logits.")}
    head = {key: value for key, value in net.state_dict().items() if key.startswith("head.")}
    load_state(net, trunk | head, origin=WEIGHTS)
    return net.eval()  # type: ignore[return-value]


@cache
def dataset(part: str) -> ClipDataset:
    return open_dataset("jhmdb", part=part, split=1, spec=spec(), with_points=True)  # type: ignore[arg-type]


def clips(part: str, max_clips: int | None = None) -> list[ClipMaps]:
    """All clips of a part, in order; those that are not kept yet are made, which takes about 2 s each on one core."""
    found, net, start = [], None, time.perf_counter()
    records = dataset(part).records[:max_clips]
    for number, record in enumerate(records, start=1):
        file = FOLDER / "runs" / "features" / part / f"{record.name.replace('/', '--')}.safetensors"
        if not file.is_file():
            net = net or net_on_kinetics()
            make(net, record, part, file)
            seconds = time.perf_counter() - start
            print(f"{part} {number} of {len(records)}, {seconds:.0f} s: {record.name}", flush=True)
        with safe_open(str(file), "pt") as kept:
            found.append(ClipMaps(record.name, kept.get_tensor("maps_TCHW"), kept.get_tensor("points_TP2_px")))
    return found


@torch.no_grad()
def make(net: DepthNet, record: ClipRecord, part: str, file: Path) -> None:
    clip = shortened(next(of_record(record, part)))
    maps_TCHW = net.features(as_input(clip))[0].half()
    points_TP2 = torch.stack([truth.value.points_P2_px for truth in clip.truths])  # type: ignore[union-attr]
    file.parent.mkdir(parents=True, exist_ok=True)
    with write_beside(file) as beside:
        save_file({"maps_TCHW": maps_TCHW.contiguous(), "points_TP2_px": points_TP2}, beside)


def of_record(record: ClipRecord, part: str) -> Iterator[LabelledClip]:
    """The clip as streaming evaluation shows it: all its frames, on which a data set's ``part`` has no influence."""
    whole = dataset(part)
    one = ClipDataset([record], whole.class_names, part="test", spec=spec(), points=whole.points)
    return labelled_clips(one, "keypoints")


def shortened(clip: LabelledClip, num_frames: int = NUM_FRAMES) -> LabelledClip:
    """Its first frames; none of those whose joints are not known."""
    truths = clip.truths[:num_frames]
    return replace(clip, frames=tuple(islice(clip.frames, len(truths))), truths=truths)


def as_input(clip: LabelledClip) -> Tensor:
    """The frames as the model wants them, (1, T, 3, H, W): the very pixels of a stream."""
    rgb_THWC = torch.stack([frame.rgb_HWC for frame in clip.frames])
    return prepare(Clip(rgb_THWC, tuple(frame.pts_seconds for frame in clip.frames)), spec())


if __name__ == "__main__":
    torch.set_num_threads(1)
    for which in sys.argv[1:] or ("train", "test"):
        print(which, sum(len(clip.maps_TCHW) for clip in clips(which)), "frames", flush=True)
