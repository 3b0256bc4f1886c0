"""The sound of the synthetic video: a steady tone per class, panned with the object, and a click at every bounce."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sidestream.types import Sound
from sidestream.video.motion import MovingShape

CLICK_SECONDS = 0.03
CLICK_HZ = 3000.0
CLICK_DECAY_SECONDS = 0.005


def tone_hz(label: int) -> float:
    """The tone of a class: whole-tone steps up from 220 Hz."""
    return 220.0 * 2 ** (label / 6)


def sound_of(
    shapes: Sequence[MovingShape], size_px: tuple[int, int], span_seconds: tuple[float, float], sample_rate_hz: int
) -> Sound:
    """Stereo samples of a stretch; sample n of the video is at n / sample_rate_hz, whatever the stretch asked for."""
    first, last = (round(seconds * sample_rate_hz) for seconds in span_seconds)
    seconds = np.arange(first, last) / sample_rate_hz
    stereo = np.zeros((2, seconds.size))
    for shape in shapes:
        stereo += 0.6 * _voice(shape, size_px, seconds) / max(1, len(shapes))
    samples = torch.from_numpy(np.clip(stereo, -1.0, 1.0).astype(np.float32))
    return Sound(samples, sample_rate_hz, first / sample_rate_hz)


def _voice(shape: MovingShape, size_px: tuple[int, int], seconds: np.ndarray) -> np.ndarray:
    """One object: loud on the side where it is (equal power), louder the bigger it is."""
    x, _ = shape.centre_px(seconds, size_px)
    across = 0.5 * np.pi * x / size_px[1]
    loudness = 0.4 + shape.radius_px / min(size_px)
    mono = loudness * np.sin(2 * np.pi * tone_hz(shape.label) * seconds)
    return np.stack([np.cos(across), np.sin(across)]) * (mono + _clicks(shape, size_px, seconds))


def _clicks(shape: MovingShape, size_px: tuple[int, int], seconds: np.ndarray) -> np.ndarray:
    clicks = np.zeros_like(seconds)
    if not seconds.size:
        return clicks
    for at_seconds in shape.bounces((seconds[0] - CLICK_SECONDS, seconds[-1] + 1e-9), size_px):
        since = seconds - at_seconds
        during = (since >= 0) & (since < CLICK_SECONDS)
        since = since[during]
        clicks[during] += np.exp(-since / CLICK_DECAY_SECONDS) * np.sin(2 * np.pi * CLICK_HZ * since)
    return clicks
