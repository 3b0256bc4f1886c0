"""Sends MPEG-TS or RTSP in real time to an FFmpeg address, one session after the other; run by test_network.

Arguments: address, frames a second, then for every session NUM_FRAMES:GREY. A listening address takes one reader
per session; to a reader that listens for RTSP, the connection is tried for 20 s.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import av
import numpy as np


def send(address: str, rate: int, num_frames: int, grey: int) -> None:
    """One session: ``num_frames`` flat pictures of that grey."""
    kind = "rtsp" if address.startswith("rtsp:") else "mpegts"
    with av.open(address, "w", format=kind, options={"rtsp_transport": "tcp"} if kind == "rtsp" else {}) as container:
        options = {"preset": "ultrafast", "tune": "zerolatency", "g": "10"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        started = time.monotonic()
        for number in range(num_frames):
            picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), grey, np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
            time.sleep(max(0.0, started + (number + 1) / rate - time.monotonic()))
        container.mux(stream.encode(None))


def send_when_heard(*session: Any) -> None:
    """``send``, as soon as somebody listens."""
    until = time.monotonic() + 20
    while True:
        try:
            return send(*session)
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    for session in sys.argv[3:]:
        frames, level = session.split(":")
        try:
            send_when_heard(sys.argv[1], int(sys.argv[2]), int(frames), int(level))
        except OSError as error:  # the reader left first
            sys.stderr.write(f"{error}\n")
