"""The sound of a file as float samples on the video's time axis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import torch

from sidestream.types import Sound

MAX_GAP_SECONDS = 0.05
"""A hole between two blocks of sound longer than this is filled with silence, so that what follows stays in step."""
MAX_SILENCE_SECONDS = 600.0
"""A longer hole is taken for a broken time stamp."""


def read_sound(
    name: str, origin_seconds: float, start_seconds: float = 0.0, end_seconds: float | None = None
) -> Sound | None:
    """The first sound stream of a file between two times; None where there is none, or none that can be decoded.

    Args:
        name: what FFmpeg opens.
        origin_seconds: the container's own time stamp of the first video frame, which is time 0.
        start_seconds, end_seconds: the stretch that is wanted, half open.

    Returns:
        float32 samples (channels, samples) at the file's own rate; ``start_seconds`` of the first of them.
    """
    try:
        with av.open(name, metadata_errors="replace") as container:
            if not container.streams.audio or container.streams.audio[0].codec_context is None:
                return None
            stream = container.streams.audio[0]
            stream.codec_context.thread_count = 1
            found = _blocks(container, stream, end_seconds, origin_seconds)
            blocks = [(at - origin_seconds, rate, samples) for at, rate, samples in found]
    except (av.FFmpegError, OSError, ValueError):
        return None
    return _joined(blocks, start_seconds, end_seconds) if blocks else None


def _blocks(
    container: Any, stream: Any, end_seconds: float | None, origin_seconds: float
) -> Iterator[tuple[float, int, np.ndarray]]:
    """(time stamp, sample rate, samples) of every decoded block; broken packets are passed over."""
    resampler, following = None, None
    for packet in _packets(container, stream):
        for frame in _decoded(stream, packet):
            at = following if frame.pts is None or not frame.time_base else float(frame.pts * frame.time_base)
            at = at if at is not None else origin_seconds
            if end_seconds is not None and at - origin_seconds >= end_seconds:
                return
            if resampler is None:
                resampler = av.AudioResampler("fltp", frame.layout, frame.sample_rate)
                rate = frame.sample_rate
            for ready in resampler.resample(frame):
                yield at, rate, ready.to_ndarray()
            following = at + frame.samples / rate


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    try:
        yield from container.demux(stream)
    except (av.FFmpegError, OSError):
        return


def _decoded(stream: Any, packet: Any) -> list[Any]:
    try:
        return list(stream.codec_context.decode(packet if packet.size else None))
    except (av.FFmpegError, ValueError):
        return []


def _joined(blocks: list[tuple[float, int, np.ndarray]], start_seconds: float, end_seconds: float | None) -> Sound:
    """One row of samples: holes filled with silence, cut to the stretch."""
    rate = blocks[0][1]
    first_seconds = blocks[0][0]
    parts: list[np.ndarray] = []
    done = 0
    for at, _, samples in blocks:
        hole = round((at - first_seconds) * rate) - done
        if MAX_GAP_SECONDS * rate < hole < MAX_SILENCE_SECONDS * rate:
            parts.append(np.zeros((samples.shape[0], hole), dtype=np.float32))
            done += hole
        parts.append(samples)
        done += samples.shape[1]
    joined = np.concatenate(parts, axis=1)
    skip = max(0, round((start_seconds - first_seconds) * rate))
    stop = joined.shape[1] if end_seconds is None else max(skip, round((end_seconds - first_seconds) * rate))
    wanted = torch.from_numpy(np.ascontiguousarray(joined[:, skip:stop], dtype=np.float32))
    return Sound(wanted.clamp_(-1.0, 1.0), rate, first_seconds + skip / rate)
