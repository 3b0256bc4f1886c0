"""The picture of ``sidestream demo --latency``: lanes side by side at one moment, and below each which stage does what.

title             title
+-------------+   +-------------+      the frame that the camera shows now, and on it the newest answer
|             |   |             |
+-------------+   +-------------+
answer to frame 37, 120 ms old ...
camera   34 35 36 37 38 39 40          the last 16 frames; grey: dropped
stage 1  34 35 36 37 38 39 40          which frame each stage works on; dark: idle
stage 2     34 35 36 37 38 39
answer         34 35 36 37 38          the newest answer at each moment
caption
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sidestream.cli.demo_latency_lanes import Lane
from sidestream.evals.streaming import Answer, latest_ready
from sidestream.evals.streaming.pairing import TIE_SECONDS
from sidestream.types import Frame
from sidestream.video.overlay import COLOURS

NUM_SHOWN_FRAMES = 16
GROUND, TRACK, DROPPED, INK, PALE = (18, 20, 26), (38, 42, 50), (66, 70, 80), (240, 242, 246), (150, 156, 168)
NOW, DARK = (255, 255, 255), (16, 16, 18)
Drawer = Callable[[Frame, "Answer | None"], Frame]
"""``draw(frame, answer)``: the frame with the answer on it."""


@dataclass(frozen=True)
class Scene:
    """What does not change from moment to moment."""

    lanes: Sequence[Lane]
    frames: Sequence[Frame]
    frame_rate: float
    draw: Drawer
    caption: Sequence[str]
    panel_px: tuple[int, int] = (352, 624)
    """Height and width of each lane's picture."""
    shows_answered: bool = False
    """Whether the frame that the answer is about is shown in a corner (answers that have no place in the picture)."""


class Painter:
    """``picture(t)``: uint8 (H, W, 3) of the scene ``t`` seconds after the first frame was due."""

    def __init__(self, scene: Scene) -> None:
        from PIL import ImageFont

        self.scene = scene
        height, width = scene.panel_px
        self.text_px = max(8, round(width / 40))
        self.row_px = round(self.text_px * 1.45)
        self.gap_px = max(4, self.text_px // 2)
        self._fonts = {k: ImageFont.load_default(max(6, round(self.text_px * s))) for k, s in _SCALES.items()}
        rows = max(lane.num_stages for lane in scene.lanes) + 2
        self.head_px = round(2.1 * self.text_px)
        self.state_px = round(2.0 * self.text_px)
        self.strip_px = rows * self.row_px + self.gap_px
        self.foot_px = round(1.5 * self.text_px) * len(scene.caption) + self.gap_px
        across = len(scene.lanes) * (width + self.gap_px) + self.gap_px
        down = self.head_px + height + self.state_px + self.strip_px + self.foot_px
        self.size_px = (down + down % 2, across + across % 2)

    def picture(self, t: float) -> np.ndarray:
        from PIL import Image, ImageDraw

        canvas = Image.new("RGB", (self.size_px[1], self.size_px[0]), GROUND)
        pen = ImageDraw.Draw(canvas)
        width = self.scene.panel_px[1]
        for number, lane in enumerate(self.scene.lanes):
            left = self.gap_px + number * (width + self.gap_px)
            self._lane(canvas, pen, lane, left, t)
        top = self.size_px[0] - self.foot_px
        for row, line in enumerate(self.scene.caption):
            self._text(pen, self.gap_px, top + (row + 0.5) * 1.5 * self.text_px, line, "small", PALE, "lm")
        return np.asarray(canvas)

    def _lane(self, canvas: Any, pen: Any, lane: Lane, left: int, t: float) -> None:
        from PIL import Image

        height, width = self.scene.panel_px
        now = newest_frame(self.scene.frames, t)
        answer = newest_answer(lane, t)
        self._text(pen, left, self.head_px / 2, lane.title, "large", INK, "lm")
        canvas.paste(Image.fromarray(self._shown(now, answer)), (left, self.head_px))
        top = self.head_px + height
        middle = top + self.state_px / 2
        self._text(pen, left, middle, state_line(lane, answer, t), "plain", INK, "lm")
        self._text(pen, left + width, middle, f"frame {now.index}   {now.pts_seconds:.2f} s", "plain", PALE, "rm")
        self._strip(pen, lane, left, top + self.state_px, t)

    def _shown(self, now: Frame, answer: Answer | None) -> np.ndarray:
        """The camera's frame with the answer drawn in, in the panel's size."""
        from sidestream.video.letterbox import letterbox

        shown = letterbox(self.scene.draw(now, answer).rgb_HWC.numpy(), self.scene.panel_px)
        if not (self.scene.shows_answered and answer is not None):
            return shown
        height, width = (side // 4 for side in self.scene.panel_px)
        seen = next(f for f in self.scene.frames if f.index == answer.frame_index)
        shown, edge = shown.copy(), max(2, self.text_px // 6)
        shown[-height - 2 * edge :, -width - 2 * edge :] = colour_of(answer.frame_index)
        shown[-height - edge : -edge, -width - edge : -edge] = letterbox(seen.rgb_HWC.numpy(), (height, width))
        return shown

    def _strip(self, pen: Any, lane: Lane, left: int, top: int, t: float) -> None:
        """Rows for camera, stages and answer over the last ``NUM_SHOWN_FRAMES`` frame times; now is at the right."""
        label_px, width = round(4.6 * self.text_px), self.scene.panel_px[1]
        across = _Axis(left + label_px, left + width, t - NUM_SHOWN_FRAMES / self.scene.frame_rate, t)
        names = ["camera", *(f"stage {n + 1}" for n in range(lane.num_stages)), "answer"]
        for row, name in enumerate(names):
            upper = top + row * self.row_px
            self._text(pen, left, upper + self.row_px / 2, name, "small", PALE, "lm")
            pen.rectangle((across.left, upper + 1, across.right, upper + self.row_px - 2), fill=TRACK)
        taken = {span.frame_index for span in lane.spans}
        period = 1 / self.scene.frame_rate
        for frame in self.scene.frames:
            due = frame.pts_seconds
            fill = colour_of(frame.index) if frame.index in taken else DROPPED
            self._block(pen, across, top, (due, due + period), frame.index, fill)
        for span in lane.spans:
            upper = top + (1 + span.stage) * self.row_px
            times = (span.start_seconds, span.end_seconds)
            self._block(pen, across, upper, times, span.frame_index, colour_of(span.frame_index))
        upper = top + (1 + lane.num_stages) * self.row_px
        ends = [a.ready_seconds for a in lane.answers[1:]] + [max(t, lane.answers[-1].ready_seconds)]
        for answer, end in zip(lane.answers, ends, strict=True):
            times = (answer.ready_seconds, end)
            self._block(pen, across, upper, times, answer.frame_index, colour_of(answer.frame_index))
        pen.line((across.right, top, across.right, top + len(names) * self.row_px - 2), fill=NOW, width=2)

    def _block(
        self, pen: Any, across: _Axis, upper: int, times: tuple[float, float], index: int, fill: tuple[int, int, int]
    ) -> None:
        start, end = across.place(times[0]), across.place(times[1])
        if end - start < 1:
            return
        pen.rectangle((start, upper + 1, max(start, end - 2), upper + self.row_px - 2), fill=fill)
        text = str(index)
        if pen.textlength(text, font=self._fonts["small"]) <= end - start - 2:
            ink = PALE if fill == DROPPED else DARK
            self._text(pen, (start + end) / 2 - 1, upper + self.row_px / 2, text, "small", ink, "mm")

    def _text(self, pen: Any, x: float, y: float, text: str, size: str, ink: tuple[int, int, int], anchor: str) -> None:
        pen.text((x, y), text, fill=ink, font=self._fonts[size], anchor=anchor)


_SCALES: Mapping[str, float] = {"small": 0.85, "plain": 1.0, "large": 1.3}


@dataclass(frozen=True)
class _Axis:
    """Time across the strip, cut off at its ends."""

    left: int
    right: int
    start_seconds: float
    end_seconds: float

    def place(self, seconds: float) -> int:
        share = (seconds - self.start_seconds) / (self.end_seconds - self.start_seconds)
        return round(self.left + min(max(share, 0.0), 1.0) * (self.right - self.left))


def colour_of(frame_index: int) -> tuple[int, int, int]:
    """The colour that a frame has in the strips."""
    return COLOURS[frame_index % len(COLOURS)]


def newest_answer(lane: Lane, t: float) -> Answer | None:
    """The answer that a viewer knows at ``t``: the latest one that is ready."""
    (number,) = latest_ready([a.ready_seconds for a in lane.answers], [t + TIE_SECONDS])
    return None if number is None else lane.answers[number]


def newest_frame(frames: Sequence[Frame], t: float) -> Frame:
    """The frame that the camera shows at ``t``."""
    return frames[max(0, bisect_right([f.pts_seconds for f in frames], t + TIE_SECONDS) - 1)]


def state_line(lane: Lane, answer: Answer | None, t: float) -> str:
    """Which frame the answer on show is about, how old that frame is, and how many answers came a second so far."""
    if answer is None:
        return "no answer yet"
    num_ready = sum(a.ready_seconds <= t + TIE_SECONDS for a in lane.answers)
    age_ms = 1e3 * (t - answer.pts_seconds)
    rate = f", {num_ready / t:.1f} answers/s" if t > 0 else ""
    return f"answer to frame {answer.frame_index}: {age_ms:.0f} ms old{rate}"
