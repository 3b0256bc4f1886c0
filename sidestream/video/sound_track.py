"""The sound track of a file that is being written, fed bit by bit beside the pictures."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import av
import numpy as np

from sidestream.errors import LayoutError
from sidestream.types import Sound

BLOCK_SAMPLES = 1024
OPUS_RATES_HZ = (8000, 12000, 16000, 24000, 48000)


class SoundTrack:
    """Encodes a ``Sound`` into an open container; what lies before time 0 is cut off."""

    def __init__(self, container: Any, codec: str, sound: Sound) -> None:
        samples = sound.samples_CN.detach().cpu().float().numpy()
        if samples.ndim != 2 or samples.shape[0] not in (1, 2):
            raise LayoutError(f"sound has shape {samples.shape}; give (channels, samples) with 1 or 2 channels")
        first = round(sound.start_seconds * sound.sample_rate_hz)
        self._samples = np.ascontiguousarray(np.clip(samples[:, max(0, -first) :], -1.0, 1.0))
        self._start, self._done = max(0, first), 0
        self._rate = sound.sample_rate_hz
        self._layout = "mono" if samples.shape[0] == 1 else "stereo"
        out_rate = 48000 if codec == "libopus" and self._rate not in OPUS_RATES_HZ else self._rate
        self._container = container
        self._stream = container.add_stream(codec, rate=out_rate, layout=self._layout)
        self._resampler = av.AudioResampler(self._stream.codec_context.format or "fltp", self._layout, out_rate)

    def write_until(self, seconds: float) -> None:
        """Encode up to that time, in whole blocks."""
        until = min(int(seconds * self._rate) - self._start, self._samples.shape[1])
        while self._done + BLOCK_SAMPLES <= until:
            self._write(BLOCK_SAMPLES)

    def finish(self) -> None:
        """Encode the rest and what the codec still holds."""
        while self._done < self._samples.shape[1]:
            self._write(min(BLOCK_SAMPLES, self._samples.shape[1] - self._done))
        for frame in self._resampler.resample(None):
            self._container.mux(self._stream.encode(frame))
        self._container.mux(self._stream.encode(None))

    def _write(self, num_samples: int) -> None:
        block = np.ascontiguousarray(self._samples[:, self._done : self._done + num_samples])
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=self._layout)
        frame.sample_rate, frame.time_base = self._rate, Fraction(1, self._rate)
        frame.pts = self._start + self._done
        for ready in self._resampler.resample(frame):
            self._container.mux(self._stream.encode(ready))
        self._done += num_samples
