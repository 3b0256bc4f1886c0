"""Reads a source to its end and prints its memory after the start and at the end; run by test_memory as a process.

Arguments: the source, how many frames to read.
"""

from __future__ import annotations

import sys

import psutil

from sidestream.video import stream

WARM_UP_FRAMES = 500

if __name__ == "__main__":
    memory, num_frames, begin_bytes, most_bytes = psutil.Process().memory_info, 0, 0, 0
    with stream(sys.argv[1], max_frames=int(sys.argv[2]), loop=not sys.argv[1].startswith("synthetic")) as frames:
        for _ in frames:
            num_frames += 1
            if num_frames == WARM_UP_FRAMES:
                begin_bytes = memory().rss
            elif num_frames > WARM_UP_FRAMES and num_frames % 250 == 0:
                most_bytes = max(most_bytes, memory().rss)
    sys.stdout.write(f"{num_frames} {begin_bytes} {most_bytes}\n")
