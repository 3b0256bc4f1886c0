"""Reads the files named on the command line, one line of outcome each; run by test_fuzz in a process of its own."""

from __future__ import annotations

import faulthandler
import sys

import torch

from sidestream.errors import SourceError
from sidestream.video import read, stream

CASE_SECONDS = 20
MAX_FRAMES = 400


def outcome(path: str) -> str:
    """ "frames N", "refused: MESSAGE" or "BAD ..." for one file."""
    try:
        num_frames, last_seconds = 0, -1.0
        with stream(path, max_frames=MAX_FRAMES) as frames:
            for frame in frames:
                if frame.rgb_HWC.dtype != torch.uint8 or frame.rgb_HWC.shape[2] != 3 or frame.index != num_frames:
                    return f"BAD frame {frame.index}: {frame.rgb_HWC.dtype} {tuple(frame.rgb_HWC.shape)}"
                if frame.pts_seconds <= last_seconds:
                    return f"BAD time {frame.pts_seconds} after {last_seconds}"
                num_frames, last_seconds = num_frames + 1, frame.pts_seconds
        read(path, max_frames=2, with_sound=True)
        if num_frames and (bad := outcome_of_dropping(path, num_frames)):
            return bad
        return f"frames {num_frames}" if num_frames else "BAD no frame and no error"
    except SourceError as error:
        message = str(error)
        return f"refused: {message}" if path in message and "\n" not in message else f"BAD message {message!r}"
    except BaseException as error:
        return f"BAD {type(error).__name__}: {error}"


def outcome_of_dropping(path: str, num_frames: int) -> str:
    """What is wrong with the policies that read ahead and may drop; "" where nothing is."""
    for policy in ("newest", "bounded:4"):
        with stream(path, policy=policy, max_frames=num_frames) as frames:
            indices = [frame.index for frame in frames]
            stats = frames.stats
        if not indices or indices != sorted(set(indices)):
            return f"BAD {policy}: frames {indices}"
        if num_frames < MAX_FRAMES and stats.num_frames + stats.num_dropped != num_frames:
            return f"BAD {policy}: {stats.num_frames} given and {stats.num_dropped} dropped of {num_frames}"
    return ""


if __name__ == "__main__":
    for name in sys.argv[1:]:
        faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
        sys.stdout.write(f"{name}\t{outcome(name)}\n")
        sys.stdout.flush()
    faulthandler.cancel_dump_traceback_later()
