"""The part live without a clock: what dropping frames does to a trunk with a memory, and what lateness does.

The net in sequence (lag 0) on the clips of the part live, each behind its lead-in. Every ``STEP``-th frame of a clip is
judged: by its own answer where all frames are fed; by its own where only those are (the lead-in is whole in both
cases); and where all are fed by the answer to the frame ``LATE`` frames earlier, from frame ``FIRST_LATE`` on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from judging import right_of
from live_nets import NETS, NETS_FOLDER, Loaded, led_in, num_clips

from sidestream.data import open_dataset
from sidestream.evals.streaming import Answer, Pair, run_offline
from sidestream.evals.streaming.judge import points_answer
from sidestream.evals.streaming.labelled import LabelledClip, labelled_clips
from sidestream.types import Frame

RATE = 30.0
STEP = 3
LATE = 3, 5
FIRST_LATE = 6
"""The first frame of a clip that is judged by late answers: even the latest of them is to a frame of the clip."""


def measure(
    quick: bool, known: Sequence[dict[str, Any]], *, nets_folder: Path = NETS_FOLDER
) -> Iterator[dict[str, Any]]:
    """A record per clip that is not ``known`` (cases)."""
    torch.set_num_threads(1)
    circuit, spec = Loaded(nets_folder).circuit(NETS["sequential, 1 thread"])
    dataset = open_dataset("jhmdb", part="test", split=1)
    for plain in labelled_clips(dataset, "keypoints", frame_rate=RATE, max_clips=num_clips(RATE, quick)):
        case = {"clip": plain.key}
        if case in known:
            continue
        clip = led_in(plain, RATE)
        answers = partial(run_offline, circuit, answer=points_answer(spec), clip=clip.key, prepare=spec)
        record = compared(answers, clip)
        print(f"control, {clip.key}: {record['right']}", flush=True)
        yield {"case": case, **record, "quick": quick}


def compared(answers: Callable[[Sequence[Frame]], Sequence[Answer]], clip: LabelledClip) -> dict[str, Any]:
    """Right points, and points, of every comparison. ``answers``: of a net without a past that is fed these frames."""
    first = clip.truths[0].frame_index
    thinned = [f for f in clip.frames if f.index < first or (f.index - first) % STEP == 0]
    of_all, of_thinned = ({a.frame_index: a for a in answers(frames)} for frames in (list(clip.frames), thinned))

    def counted(known: dict[int, Answer], late: int, begin: int) -> tuple[int, int]:
        asked = [t for t in clip.truths[begin:] if (t.frame_index - first) % STEP == 0]
        return right_of([Pair(t, known[t.frame_index - late], t.pts_seconds) for t in asked])

    found = {
        "all": counted(of_all, 0, 0),
        "thinned": counted(of_thinned, 0, 0),
        "all, from frame 6": counted(of_all, 0, FIRST_LATE),
        **{f"{late} late": counted(of_all, late, FIRST_LATE) for late in LATE},
    }
    return {
        "num_lead_in": first,
        "num_frames": len(clip.truths),
        "right": {name: right for name, (right, _) in found.items()},
        "num_points": {name: points for name, (_, points) in found.items()},
    }
