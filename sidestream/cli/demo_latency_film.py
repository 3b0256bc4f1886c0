"""What ``sidestream demo --latency`` leaves to look at: the video, and its most telling picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def film(scene: Any, path: Path, *, slow_motion: int) -> list[Path]:
    """The video: ``slow_motion`` pictures for each frame of the camera, shown at the camera's rate."""
    from sidestream.cli.demo_latency_picture import Painter
    from sidestream.video import VideoWriter

    painter = Painter(scene)
    with VideoWriter(path, frame_rate=scene.frame_rate, size_px=painter.size_px) as writer:
        for number in range(len(scene.frames) * slow_motion):
            writer.add(painter.picture(number / (slow_motion * scene.frame_rate)))
    return [path]


def still(scene: Any, path: Path) -> Path:
    """The moment in the second half of the clip at which the first lane is furthest behind the second."""
    from PIL import Image

    from sidestream.cli.demo_latency_picture import Painter, newest_answer
    from sidestream.report.record import write_beside

    def lead(t: float) -> float:
        first, second = (newest_answer(lane, t) for lane in scene.lanes[:2])
        return -1.0 if first is None or second is None else second.pts_seconds - first.pts_seconds

    times = [frame.pts_seconds for frame in scene.frames]
    picture = Painter(scene).picture(max(times[len(times) // 2 :], key=lead))
    with write_beside(path) as part:
        Image.fromarray(picture).quantize(256).save(part, format="png", optimize=True)
    return path
