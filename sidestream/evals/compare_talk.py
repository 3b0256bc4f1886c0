"""The talk's table of model families, as printed, and which model stands for which family here.

The talk has three marks ("Ok", "not great, not terrible", "pretty bad"). Its text shows two signs only, a check mark
and a cross, so that the lower two marks cannot be told apart: a cross here is either of them.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

OK, NOT_OK = "✓", "✗"
MARKS_NOTE = (
    'Marks: ✓ is the talk\'s "Ok"; ✗ is "not great, not terrible" or "pretty bad", which its text does not tell apart.'
)

FAMILIES = {
    "frame": "frame by frame (2D)",
    "rnn": "2D encoder + RNN",
    "conv3d": "3D convolutions",
    "transformer": "video transformer",
    "temporal2d": "2D temporal",
    "other": "other",
}
"""Family -> how it is written. The first four are the columns of the talk's table."""

TALK_FAMILIES = ("frame", "rnn", "conv3d", "transformer")

MARKS: dict[str, tuple[str, str, str, str]] = {
    "accuracy": (NOT_OK, NOT_OK, OK, OK),
    "latency / throughput": (NOT_OK, NOT_OK, NOT_OK, NOT_OK),
    "memory at training": (OK, NOT_OK, NOT_OK, NOT_OK),
    "memory at test": (OK, OK, NOT_OK, NOT_OK),
    "energy": (NOT_OK, NOT_OK, NOT_OK, NOT_OK),
    "causal": (OK, OK, NOT_OK, NOT_OK),
}
"""Row of the talk's table -> the marks of ``TALK_FAMILIES``."""

DEFAULT_MODELS = (
    "frame_resnet50",
    "cnn_lstm",
    "i3d",
    "r3d_18",
    "r2plus1d_18",
    "slowfast_r50",
    "timesformer_divided",
    "tsm_resnet50",
    "tsm_resnet50_online",
    "timesformer_divided_causal",
    "i3d_causal",
)
"""One model for each column, first in its family, then TSM, R(2+1)D, SlowFast, and causal variants."""

_PATTERNS = (
    ("temporal2d", ("tsm_*", "tsn_*")),
    ("frame", ("frame_*",)),
    ("rnn", ("cnn_*",)),
    ("conv3d", ("i3d*", "c3d*", "r3d*", "mc3*", "r2plus1d*", "s3d*", "slowfast*", "slow_*", "x3d*", "c2d*")),
    ("transformer", ("timesformer*", "vivit*", "videomae*", "mvit*", "swin3d*")),
)


def family_of(name: str, *, is_image_model: bool = False) -> str:
    """Family of a model by its name, with or without the library: a key of ``FAMILIES``."""
    if is_image_model:
        return "frame"
    bare = name.rpartition("/")[2]
    return next((f for f, patterns in _PATTERNS if any(fnmatchcase(bare, p) for p in patterns)), "other")
