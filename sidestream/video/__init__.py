"""Pixels in and out: read and stream video from anywhere, make it up, write it, prepare it for a model, draw on it."""

from sidestream.video.overlay import overlay
from sidestream.video.prepare import prepare, prepare_boxes, prepare_points, unprepare_boxes, unprepare_points
from sidestream.video.read import read
from sidestream.video.seek import frame_at
from sidestream.video.shapes import SHAPE_NAMES
from sidestream.video.source_kind import source_kind
from sidestream.video.sources import StreamInfo, StreamOptions
from sidestream.video.stream import Stream, StreamStats, stream
from sidestream.video.synthetic import SyntheticVideo
from sidestream.video.write import VideoWriter, write

__all__ = [
    "SHAPE_NAMES",
    "Stream",
    "StreamInfo",
    "StreamOptions",
    "StreamStats",
    "SyntheticVideo",
    "VideoWriter",
    "frame_at",
    "overlay",
    "prepare",
    "prepare_boxes",
    "prepare_points",
    "read",
    "source_kind",
    "stream",
    "unprepare_boxes",
    "unprepare_points",
    "write",
]
