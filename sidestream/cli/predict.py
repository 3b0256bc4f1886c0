"""``sidestream predict``: what a whole video shows, as one answer; a long one in several clips, stated."""

from __future__ import annotations

import contextlib
import json as json_module
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from sidestream.cli.early import check_source
from sidestream.errors import InputError, ModelError, SidestreamError, SourceError, StageError, WriteError
from sidestream.report.words import ordinal
from sidestream.types import Frame, InputSpec

MAX_FRAMES_PER_CLIP = 250
"""What a model that takes any length is given at once (10 s at 25 frames/s): bounds the memory."""

_Item = TypeVar("_Item")


def predict(
    source: Annotated[str, tyro.conf.Positional],
    model: str = "efficientnet_lite0",
    weights: str = "default",
    labels: Path | None = None,
    top_k: int = 5,
    json: Path | None = None,
    num_classes: int | None = None,
) -> int:
    """Name what a whole video shows: one answer for a file, a GIF or a folder of images.

    A clip model reads consecutive clips of its own length, and their logits are averaged; frames at the end that fill
    no clip are left out. One that takes any length reads the whole video, in clips of at most 250 frames or so. A
    frame model reads every frame, and their logits are averaged. The answer says how it was made.

    Args:
        source: a video file, a GIF or a folder of images.
        model: a name from `sidestream models` (torchvision and timm names work).
        weights: default (the library's own), random, or a local .safetensors / .pt file.
        labels: file with one label per line, or a JSON list.
        top_k: classes in the answer.
        json: file to write the answer to.
        num_classes: classes of the model's head, where they are not the library's.
    """
    if top_k < 1:
        raise InputError(f"--top-k {top_k}; expected 1 or more")
    check_source(source)
    _check_writable(json)
    from sidestream.models import create_model, info_of
    from sidestream.models.create import check_model
    from sidestream.report.record import write_text

    _check_ends(source)
    check_model(model, weights, labels)
    with _status() as say:
        say(f"loading {model}")
        given = None if weights == "random" else weights
        net = create_model(model, num_classes=num_classes, weights=given, labels=labels)
        info = info_of(net)
        assert info is not None  # create_model hangs one on every model
        tally = Tally(model, info.input_spec)
        logits_1N = tally.answer(net, source, say)
    record = {"source": source, "model": model, **tally.record(logits_1N, info.labels, top_k)}
    if json is not None:
        write_text(json, json_module.dumps(record, indent=2, ensure_ascii=False) + "\n")
    _show(record, tally.num_promised)
    return 0


def in_clips(items: Iterable[_Item], spec: InputSpec, *, max_frames: int | None = None) -> Iterator[list[_Item]]:
    """Consecutive clips, of the model's own length; the rest at the end that fills none is left out.

    Where the model takes any length: of ``max_frames`` (default ``MAX_FRAMES_PER_CLIP``), and no frame is left out.
    A rest too short for a clip is added to the last one: with 6 frames at most and 3 at least,

        14 frames    6, 8        15 frames    6, 6, 3        2 frames    none
    """
    num_frames, num_least = spec.num_frames, 0
    if spec.min_frames is not None:
        num_frames, num_least = max(max_frames or MAX_FRAMES_PER_CLIP, spec.min_frames), spec.min_frames
    waiting: list[_Item] = []
    for item in items:
        waiting.append(item)
        if len(waiting) == num_frames + num_least:
            yield waiting[:num_frames]
            waiting = waiting[num_frames:]
    if num_least and len(waiting) >= num_least:
        yield waiting


@dataclass
class Tally:
    """The answer for one video, clip after clip, and the books of how it was made."""

    name: str
    spec: InputSpec
    num_frames: int = 0
    num_promised: int = 0
    """Frames that the file's header speaks of, about; 0 where it does not."""
    lengths: list[int] = field(default_factory=list)
    """Frames of each clip."""

    def answer(self, net: Any, source: str, say: Callable[[str], None]) -> Any:
        """Logits (1, N): the mean over the clips, each weighted by its frames."""
        from sidestream.video import prepare, stream

        total_1N: Any = 0.0
        with stream(source, policy="lossless") as frames:
            picked = islice(self._counted(frames), 0, None, self.spec.frame_step)
            for clip in in_clips((prepare(frame, self.spec) for frame in picked), self.spec):
                say(f"{self.name}: {self.num_frames} frames read")
                total_1N = total_1N + len(clip) * self._logits(net, clip)
                self.lengths.append(len(clip))
        if not self.lengths:
            raise SourceError(self._too_short(source))
        self.num_promised = round((frames.info.frame_rate or 0) * (frames.info.duration_seconds or 0))
        return total_1N / sum(self.lengths)

    def _counted(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        for frame in frames:
            self.num_frames += 1
            yield frame

    def _logits(self, net: Any, clip: Sequence[Any]) -> Any:
        import torch

        from sidestream.cli.answers import top_classes

        given = clip[0] if self.spec.layout == "BCHW" else torch.stack(tuple(clip), dim=1)
        try:
            with torch.inference_mode():
                logits_1N = net(given)
        except SidestreamError:
            raise
        except Exception as error:
            where = f"{self.name} failed on clip {len(self.lengths) + 1}, which ends at frame {self.num_frames}"
            raise StageError(f"{where}: {type(error).__name__}: {error}") from error
        top_classes(logits_1N, None, top_k=1)  # refuses what is not a row of logits
        if not logits_1N.isfinite().all():
            raise ModelError(f"{self.name} answers with logits that are NaN or infinite; check its weights")
        return logits_1N.float()

    def record(self, logits_1N: Any, labels: Sequence[str] | None, top_k: int) -> dict[str, Any]:
        """What is written: the classes, and how they were found."""
        from sidestream.cli.answers import top_classes

        return {
            "top": top_classes(logits_1N, labels, top_k=top_k),
            "clips": len(self.lengths),
            "frames": self.num_frames,
            "frames_read": sum(self.lengths),
            "how": self.how,
        }

    @property
    def how(self) -> str:
        """In words: how many clips of which length, and what became of their logits."""
        every = "" if self.spec.frame_step == 1 else f", every {ordinal(self.spec.frame_step)} frame"
        if self.spec.layout == "BCHW":
            return f"mean of the logits of {len(self.lengths)} frames"
        if len(self.lengths) == 1:
            return f"one clip of {self.lengths[0]} frame{'' if self.lengths[0] == 1 else 's'}{every}"
        clips = f"mean of the logits of {len(self.lengths)} consecutive clips"
        if len(set(self.lengths)) == 1:
            return f"{clips} of {self.lengths[0]} frames{every}"
        return f"{clips} of {', '.join(map(str, self.lengths))} frames{every}, each weighted by its frames"

    def _too_short(self, source: str) -> str:
        spec, least = self.spec, self.spec.min_frames or self.spec.num_frames
        every = "" if spec.frame_step == 1 else f", every {ordinal(spec.frame_step)} of the video"
        return (
            f"{source} has {self.num_frames} frames, too few for {self.name}: it reads clips of {least} frames{every}; "
            f"give a video of {(least - 1) * spec.frame_step + 1} or more"
        )


def _check_ends(source: str) -> None:
    from sidestream.video import source_kind

    if (kind := source_kind(source)) not in ("file", "folder"):
        raise InputError(
            f"{source} is a {kind} source, not a whole video; give a file or a folder, or use sidestream run"
        )


def _check_writable(path: Path | None) -> None:
    """Before the work, not after it."""
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise WriteError(
            f"cannot write {str(path)!r}; give the path of a file in a folder that exists and may be written"
        )


def _show(record: dict[str, Any], num_promised: int) -> None:
    for n, found in enumerate(record["top"], start=1):
        print(f"{n}  {found['probability']:.5f}  {found['logit']:9.3f}  {found['label']}")
    print(f"{record['model']} on {record['source']}: {record['how']}, of {record['frames']}")
    if record["frames"] < 0.8 * num_promised:
        print(
            f"warning: {record['source']} speaks of about {num_promised} frames, but {record['frames']} could be read: "
            "it may be cut off",
            file=sys.stderr,
        )


@contextlib.contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """A spinner that says what is being done (silent where the output is no terminal)."""
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield status.update
