"""Small video files for the tests of the data sets."""

from __future__ import annotations

from pathlib import Path

from sidestream.video import SyntheticVideo, write


def make_video(path: Path, *, seed: int = 0, num_frames: int = 12) -> Path:
    """An H.264 file of 48 x 64 pixels at 25 frames a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, SyntheticVideo(seed=seed, num_frames=num_frames, size_px=(48, 64)).clip())


def make_folder(folder: Path, *, num_clips: int = 5) -> Path:
    """Two classes, "in" and "out", of so many clips each."""
    for label, name in enumerate(("in", "out")):
        for n in range(num_clips):
            make_video(folder / name / f"{n}.mp4", seed=10 * label + n)
    return folder
