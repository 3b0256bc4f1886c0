"""A model of the matrix at a small size, what it is fed, and what it says by itself: the numbers to compare with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import HUGE, OWN, lengths, lively, on_meta, rule_of, sizes_px
from torch import Tensor, nn

from sidestream.models import create_model, info_of
from sidestream.models.info import ModelInfo, attach_info
from sidestream.models.on_stream import net_on_stream
from sidestream.models.pretrained import save_pretrained
from sidestream.nn.combine import Chain
from sidestream.nn.steppable import step_through
from sidestream.types import InputSpec
from sidestream.video import prepare, stream

Answers = list[tuple[int, Any]]
"""Number of a frame, and the answer to it."""
NUM_CLASSES = 7
NUM_FRAMES, NUM_CLIPS = 4, 2
"""Frames for a model that answers each by itself, clips where clips are frames."""


@dataclass
class Subject:
    """A model, with weights that hide nothing; answers are made on one thread, frame by frame, without Sidestream's
    engine."""

    name: str
    model: nn.Module
    info: ModelInfo
    folder: Path
    """Where it can be saved for the command line."""
    is_saved: bool = False
    kept: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def net(self) -> nn.Module:
        """The model as it is fed one frame at a time."""
        return net_on_stream(self.model, self.info)[0]

    @property
    def frame_spec(self) -> InputSpec:
        return net_on_stream(self.model, self.info)[1].input_spec

    @property
    def num_frames(self) -> int:
        """Enough for three answers and, where it looks ahead, one before the stream ends; whole periods, since a clip
        form may lay its strides by the end of the clip."""
        if not isinstance(self.net, Chain):
            return NUM_FRAMES
        period = self.net.period_ticks
        least = (lengths(self.name)[0] - 1) * self.info.input_spec.frame_step + 1
        return -(-max(least, 2 * period + 1 + self.net.delay_ticks, NUM_FRAMES) // period) * period

    @property
    def source(self) -> str:
        """For the command line: a video of as many frames, a little larger than the model's."""
        height, width = self.info.input_spec.size_px
        return f"synthetic:frames={self.num_frames},size={height + 8}x{width + 24},seed=3,speed=4"

    @cached_property
    def frames(self) -> list[Tensor]:
        """All different."""
        chance = torch.Generator().manual_seed(5)
        return [torch.randn(1, 3, *self.info.input_spec.size_px, generator=chance) for _ in range(self.num_frames)]

    @cached_property
    def clips(self) -> list[Tensor]:
        chance = torch.Generator().manual_seed(6)
        shape = (1, lengths(self.name)[0], 3, *self.info.input_spec.size_px)
        return [torch.randn(shape, generator=chance) for _ in range(NUM_CLIPS)]

    @cached_property
    def of_frames(self) -> Answers:
        return answers_to(self, self.frames)

    @cached_property
    def of_clips(self) -> Answers:
        with torch.no_grad(), OneThread():
            return [(n, self.model(clip)) for n, clip in enumerate(self.clips)]

    @cached_property
    def of_video(self) -> Answers:
        with stream(self.source) as frames:
            return answers_to(self, [prepare(frame, self.frame_spec) for frame in frames])

    def saved(self) -> Path:
        """Its folder, made when first asked for."""
        if not self.is_saved:
            save_pretrained(self.model, self.folder)
            self.is_saved = True
        return self.folder


def subject_of(name: str, folder: Path) -> Subject:
    """The model ``name`` at its smallest size."""
    if name not in OWN and sum(p.numel() for p in on_meta(name).parameters()) > HUGE:
        pytest.skip(f"more than {HUGE / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    has_classes = name in OWN and "autoencoder" not in name
    model = create_model(name, num_classes=NUM_CLASSES if has_classes else None)
    info = info_of(model)
    assert info is not None
    size = sizes_px(name)[0] if name in OWN else smallest_px(model, info.input_spec)
    spec = info.input_spec.replace(size_px=size, resize_px=None)
    info = replace(info, input_spec=spec)
    frames = () if spec.layout == "BCHW" else (lengths(name)[0],)
    model = lively(model, torch.randn(1, *frames, 3, *size, generator=torch.Generator().manual_seed(4)))
    return Subject(name, attach_info(model, info), info, folder)


def smallest_px(model: nn.Module, spec: InputSpec) -> tuple[int, int]:
    """The size that a foreign model takes: its only one, or one of about 64 px."""
    rule = rule_of(model)
    if rule.only_px is not None:
        return rule.only_px
    if rule.multiple_of_px is not None:
        height, width = rule.multiple_of_px
        return max(64 // height, 1) * height, max(64 // width, 1) * width
    side = max(64, rule.least_px or 0)
    return side, side


@torch.no_grad()
def answers_to(subject: Subject, frames: list[Tensor]) -> Answers:
    """Frame by frame: the model on each, or the undivided chain of a clip model, to the end of the stream.

    That chain gives what the clip form gives for the whole clip (up to the order of sums), or the model itself for
    each window of its frames.
    """
    net = subject.net
    with OneThread():
        if not isinstance(net, Chain):
            return [(n, net(frame)) for n, frame in enumerate(frames)]
        clip = torch.stack(frames, 1)
        found, _ = step_through(net, clip, and_finish=True)
        kept = clip[:, :: subject.info.input_spec.frame_step]
        expected = subject.model.answers(kept) if hasattr(subject.model, "streaming") else windows(subject, kept)
    assert found.shape == expected.shape
    assert_close(found, expected)
    return [(n * net.period_ticks, answer) for n, answer in enumerate(found.unbind(1))]


def windows(subject: Subject, kept: Tensor) -> Tensor:
    """The model on its newest frames, at every half of a window; before there are so many, the first is repeated."""
    num_frames = subject.info.input_spec.num_frames
    answers = []
    for newest in range(0, kept.shape[1], max(1, num_frames // 2)):
        picked = [max(0, n) for n in range(newest - num_frames + 1, newest + 1)]
        answers.append(subject.model(kept[:, picked]))
    return torch.stack(answers, 1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Up to the order of sums: convolutions over one frame and over many, one thread and two, choose their own."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4 * scale + 1e-6)


class OneThread:
    """Inside of operators too, as stages run."""

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *exc: object) -> None:
        torch.set_num_threads(self.before)
