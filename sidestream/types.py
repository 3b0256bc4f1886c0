"""The values that travel between the parts: frames, clips, what a model wants to be fed, what a run answers.

Axis legend, used in names everywhere (``clip_BTCHW``, ``frame_BCHW``, ``rgb_HWC`` ...):

    B batch (independent streams)   T time (frames)    C channels (RGB)   H height   W width
    N objects or tokens             D features         K stages           P keypoints

Units live in names too: ``_seconds``, ``_ms``, ``_px`` (pixels, x to the right, y down), ``_bytes``, ``num_``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class _Nothing:
    """The message of a tick in which nothing was written: a stage or layer swallowed its input. There is only one."""

    def __repr__(self) -> str:
        return "NOTHING"

    def __reduce__(self) -> str:
        return "NOTHING"  # copies and pickles are the one itself


NOTHING = _Nothing()
"""A legal answer of any stage and of any layer's step: there is none in this tick. Compare with ``is``."""


@dataclass(frozen=True, slots=True)
class Truth:
    """What is really in a synthetic frame: N objects, each with a class, a box, a mask and P keypoints."""

    labels_N: Tensor
    """Class of each object, int64."""
    boxes_N4_px: Tensor
    """Tight box of the visible pixels: x_min, y_min, x_max, y_max (exclusive), float32; zeros when hidden."""
    masks_NHW: Tensor
    """Visible pixels of each object, bool."""
    keypoints_NP2_px: Tensor
    """Keypoints of each object as x, y, float32 (may lie outside of the frame)."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture of a stream: pixels as decoded, its place in the stream, and when it got here."""

    rgb_HWC: Tensor
    """uint8, shape (H, W, 3), RGB."""
    index: int
    """Number of the frame in its source, from 0; frames that a live policy dropped leave gaps."""
    pts_seconds: float
    """Presentation time, seconds from the first frame of the source."""
    arrived_at_seconds: float | None = None
    """Clock reading when the source made the frame available (for a replayed file: when it was due); None where
    nobody looked at a clock."""
    truth: Truth | None = None
    """Ground truth, only from the synthetic source."""

    @property
    def image_BCHW(self) -> Tensor:
        """The frame as the models' border wants it: float32 in [0, 1], shape (1, 3, H, W)."""
        return self.rgb_HWC.permute(2, 0, 1).unsqueeze(0).float().div_(255.0)

    @property
    def size_px(self) -> tuple[int, int]:
        """(height, width)."""
        return int(self.rgb_HWC.shape[0]), int(self.rgb_HWC.shape[1])


@dataclass(frozen=True, slots=True)
class Sound:
    """Sound of a clip: ``samples_CN`` float32 in [-1, 1], shape (channels, samples)."""

    samples_CN: Tensor
    sample_rate_hz: int
    start_seconds: float = 0.0
    """Presentation time of the first sample on the video's time axis (0 = first video frame)."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A stretch of video in memory, with the presentation time of each of its T frames."""

    rgb_THWC: Tensor
    """uint8, shape (T, H, W, 3), RGB."""
    pts_seconds: tuple[float, ...]
    """Presentation time of every frame, seconds from the first frame of the source; strictly increasing."""
    sound: Sound | None = None
    num_corrupt_packets: int = 0

    @property
    def video_BTCHW(self) -> Tensor:
        """The clip as the models' border wants it: float32 in [0, 1], shape (1, T, 3, H, W)."""
        return self.rgb_THWC.permute(0, 3, 1, 2).unsqueeze(0).float().div_(255.0)

    @property
    def num_frames(self) -> int:
        return int(self.rgb_THWC.shape[0])


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What a model wants to be fed; stored with its weights, applied by ``video.prepare``."""

    size_px: tuple[int, int] = (224, 224)
    """(height, width) after resize and centre crop."""
    resize_px: int | None = None
    """Shorter side after the resize that precedes the centre crop; None: resize straight to ``size_px``."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    """"bilinear" or "bicubic", both anti-aliased."""
    layout: str = "BCHW"
    """"BCHW" for a frame model, "BTCHW" for a clip model."""
    num_frames: int = 1
    """Frames a clip model wants (1 for frame models)."""
    min_frames: int | None = None
    """Fewest frames of a clip model that takes any number from there on; None: it wants ``num_frames``."""
    frame_step: int = 1
    """Distance of those frames in the source."""
    causal: bool = True
    """True when an answer never depends on later frames."""
    delay_ticks: int = 0
    """Frames by which the streaming form's answers come later than the frame they belong to."""

    def replace(self, **changes: Any) -> InputSpec:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True)
class Output:
    """One answer of a run, with where it comes from and when it was made."""

    value: Any
    """What the model returned, in the model's own structure (tensor, tuple, dict ...)."""
    frame_index: int
    """The frame this answers: ``age_ticks`` before the newest frame of its tick."""
    oldest_frame_index: int
    """The oldest frame that came into it over the wires (older than ``frame_index`` where a slow stage held)."""
    newest_frame_index: int
    """The newest frame that had any influence; newer than ``frame_index`` only where ages mix."""
    pts_seconds: float
    """Presentation time of the answered frame; NaN where the run was fed bare tensors."""
    tick: int
    """The tick in which the last stage made this answer."""
    age_ticks: int
    """tick - position of the answered frame in the run: K - 1 for K pipelined stages, 0 for a sequential run."""
    is_warm_up: bool
    """True while some register on the way still held its initial value instead of a frame's."""
    arrived_at_seconds: float
    """Clock reading when the answered frame became available."""
    made_at_seconds: float
    """Clock reading when the answer was complete."""
    frame: Frame | None = None
    """The answered frame itself, when the run was fed frames."""
    loss: float | None = None
    """Loss of this answer, under a training rule."""
    source: str | None = None
    """Name of its stream, where several go through one circuit."""

    @property
    def latency_seconds(self) -> float:
        """From the frame's arrival to its answer."""
        return self.made_at_seconds - self.arrived_at_seconds
