"""The video of ``sidestream evaluate --video``: on every frame its true joints, and the answer that was current."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidestream.errors import InputError

if TYPE_CHECKING:
    from sidestream.evals.streaming import Pair
    from sidestream.evals.streaming.labelled import LabelledClip
    from sidestream.types import Frame

NAME = "overlay.mp4"
SMALLEST_PX = 360
"""Smaller frames are enlarged by a whole number, until their shorter side is at least so long."""
CRF = 14
"""Quality of the video; thin lines suffer first."""
TEXT_SHARE = 0.25
"""Height of the strip for text, below the picture."""


def check_video(given: dict[str, Any]) -> None:
    """Raises ``InputError``, before any work, for flags that leave nothing to draw or no place to write it."""
    if given["video"] < 0:
        raise InputError(f"--video {given['video']}; give a number of clips, 0 or more")
    if not given["video"]:
        return
    if given["log"] is not None:
        raise InputError("--video draws on the frames of clips, which a log does not hold; give --data and --model")
    if given["head"] != "keypoints":
        raise InputError(f"--video draws keypoints, but --head is {given['head']}; give --head keypoints")
    if given["out"] is None:
        raise InputError(f"--video wants a folder for {NAME}; give --out")


def evaluation_film(pairs: Sequence[Pair], given: dict[str, Any], *, title: str) -> Path:
    """Read the first ``--video`` of the evaluated clips again, and write ``overlay.mp4`` into the folder ``--out``."""
    from sidestream.cli.evaluate_model import spec_of
    from sidestream.data import open_dataset
    from sidestream.evals.streaming.labelled import labelled_clips

    spec = spec_of(given)  # synthetic frames have the model's size
    dataset = open_dataset(given["data"], part="test", split=given["split"], root=given["root"], spec=spec)
    clips = labelled_clips(dataset, "keypoints", frame_rate=given["frame_rate"], max_clips=given["max_clips"])
    path = Path(given["out"]) / NAME
    write_film(path, pairs, islice(clips, given["video"]), frame_rate=given["frame_rate"], title=title)
    return path


def write_film(
    path: Path, pairs: Sequence[Pair], clips: Iterable[LabelledClip], *, frame_rate: float, title: str
) -> int:
    """Write the clips one after the other, beside and then renamed; returns the number of frames."""
    from sidestream.video import VideoWriter

    pairs_of: dict[str, list[Pair]] = {}
    for each in pairs:
        pairs_of.setdefault(each.truth.clip, []).append(each)
    with VideoWriter(path, frame_rate=frame_rate, fit=True, crf=CRF) as writer:
        for clip in clips:
            frames = {frame.index: frame for frame in clip.frames}
            for each in pairs_of[clip.key]:
                writer.add(film_picture(frames[each.truth.frame_index], each, title=title).rgb_HWC)
    return writer.num_frames


def film_picture(frame: Frame, judged: Pair, *, title: str) -> Frame:
    """One picture: the answer in thick orange lines, the truth over it in thin blue ones, and text below.

    The frame is enlarged first, so that small ones can be read.
    """
    import torch

    from sidestream.cli.answers import draw_points
    from sidestream.video import overlay

    truth: Any = judged.truth.value
    enlarged, factor = _enlarged(frame)
    true_P2 = torch.where(truth.scores_P[:, None] > 0, truth.points_P2_px, float("nan"))
    points_P2, scores_P = _answered(judged)
    unit_px = max(1, round(min(enlarged.size_px) / 160))
    return overlay(
        enlarged,
        points_NP2_px=torch.stack([points_P2, true_P2]) * factor,
        scores_NP=torch.stack([scores_P, torch.ones(len(true_P2))]),
        skeleton=draw_points(truth).get("skeleton", ()),
        line_px=(3 * unit_px, unit_px),
        timing=_text(judged, title),
    )


def _text(judged: Pair, title: str) -> dict[str, str]:
    """Clip and frame, how old the answer is, and how many points of it are right."""
    found, index = frame_pck(judged), judged.truth.frame_index
    age = "none yet"
    if judged.answer is not None:
        num_frames = index - judged.answer.frame_index
        age = f"of frame {judged.answer.frame_index}, {num_frames} frame{'s' * (num_frames != 1)} old"
    shares = {f"PCK@{alpha:g}": f"{each.share:.2f}" for alpha, each in found.items()}
    return {
        f"frame {index}": judged.truth.clip,
        "blue:": "truth",
        "orange:": f"answer, {title}",
        "answer": age,
        **shares,
    }


def frame_pck(judged: Pair) -> dict[float, Any]:
    """PCK of one frame, by alpha."""
    from sidestream.evals.metrics import pck
    from sidestream.evals.streaming.score import ALPHAS

    truth: Any = judged.truth.value
    points_P2, _ = _answered(judged)
    labelled_NP = truth.scores_P[None] > 0
    return {a: pck(points_P2[None], truth.points_P2_px[None], alpha=a, labelled_NP=labelled_NP) for a in ALPHAS}


def _answered(judged: Pair) -> tuple[Any, Any]:
    """The answer's points, and how sure each is; NaN where there is no answer."""
    import torch

    if judged.answer is None:
        truth: Any = judged.truth.value
        return torch.full_like(truth.points_P2_px, float("nan")), torch.ones(len(truth.points_P2_px))
    answer: Any = judged.answer.value
    return answer.points_P2_px, answer.scores_P


def _enlarged(frame: Frame) -> tuple[Frame, int]:
    """The frame, larger by a whole factor, above a dark strip for the text; and the factor."""
    from dataclasses import replace

    import torch

    from sidestream.video.letterbox import letterbox

    height, width = frame.size_px
    factor = max(1, -(-SMALLEST_PX // min(height, width)))
    rgb_HWC = torch.from_numpy(letterbox(frame.rgb_HWC.numpy(), (factor * height, factor * width)))
    strip_HWC = torch.zeros(round(TEXT_SHARE * factor * height), factor * width, 3, dtype=torch.uint8)
    return replace(frame, rgb_HWC=torch.cat([rgb_HWC, strip_HWC])), factor
