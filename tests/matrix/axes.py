"""The axes of the matrix, one table each; a new member is one line. And what cannot be, with its reason.

model        every one of our own, and one of each module of torchvision and timm
stages       numbers of stages
executor     who runs them
entrance     how frames come in and answers come out
backend      what runs the stages of a model with memory (``test_matrix_backends``)
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from model_zoo import FOREIGN, OWN, spec_of

QUICK = [
    "timm/test_efficientnet",
    "simple_cnn",
    "simple_cnn_tsm_online",
    "par_densenet_tiny",
    "conv_autoencoder_small",
    "keypoint_cnn",
    "torchvision/lraspp_mobilenet_v3_large",
    "mc3_18",
    "x3d_xs",
]
"""Small models of each kind, the quickest first: of these the default run takes a covering selection."""
MODELS = [*QUICK, *(name for name in [*OWN, *FOREIGN] if name not in QUICK)]
STAGES = ["1", "2", "3", "5"]


@dataclass(frozen=True)
class Way:
    """An executor, and what it is given so that its numbers can be told."""

    options: dict[str, Any]
    """Of ``run``."""
    flags: tuple[str, ...]
    """Of ``sidestream run``."""
    is_exact: bool = True
    """Operators run on one thread, as in the plain model. On several they may add in another order."""


ONE, TWO = ("--threads", "1"), ("--threads", "2")
EXECUTORS: dict[str, Way] = {
    "inline": Way({}, ()),
    "threads": Way({"num_threads": 2}, TWO),
    "sequential": Way({"num_threads": 1}, ONE),
    "frame-parallel": Way({"num_threads": 2}, TWO),
    "auto": Way({"num_threads": 2}, TWO, is_exact=False),  # it may pick the whole model on two threads
}
ENTRANCES = ["frames", "clips", "command"]
"""``run`` on single frames (a clip model as a chain of streaming layers, or in a window), ``run`` on whole clips (the
clip model itself, cut as a graph), and ``sidestream run`` on a video."""


@dataclass(frozen=True)
class Row:
    """One of each axis."""

    model: str
    num_stages: int
    executor: str
    entrance: str

    @property
    def way(self) -> Way:
        return EXECUTORS[self.executor]


NO_CLASSES: dict[str, str] = {
    "conv_autoencoder*": "pictures",
    "torchvision/lraspp_*": "segmentation",
    "torchvision/deeplab*": "segmentation",
    "torchvision/fcn_*": "segmentation",
}
"""Models whose answers ``sidestream run`` cannot show, and what it calls them. Refused."""
NO_MEMORY = ["frame_*", "simple_cnn", "simple_cnn_bn", "vgg8", "vgg8_bn", "vgg8_quarter", "vgg8_quarter_bn"]
NO_MEMORY += ["conv_autoencoder*", "keypoint_cnn*", "par_densenet*", "par_inception*"]
"""Clip models that look at each frame by itself. Others are refused frame-parallel on a stream of single frames."""


def no_classes(model: str) -> str | None:
    """What the model answers with, where that is nothing that ``sidestream run`` can show."""
    return next((task for pattern, task in NO_CLASSES.items() if fnmatchcase(model, pattern)), None)


BACKENDS = ["onnxruntime", "openvino", "inductor"]
QUICK_STREAMS = ["simple_cnn_tsm_online"]
"""With these the default run takes a covering selection, on back ends that are quick to build."""
STREAMS = [name for name in OWN if spec_of(name).layout == "BTCHW"]
OTHERWISE: dict[tuple[str, str], str] = {
    ("timesformer_*", "onnxruntime"): "differs from eager",  # places resized to the nearest: other ones
}
"""Models, at their small size, and back ends that compute a stage of them otherwise: refused with that sentence."""


def computes_otherwise(model: str, backend: str) -> str | None:
    """Why a back end does not run a model."""
    found = (why for (pattern, name), why in OTHERWISE.items() if name == backend and fnmatchcase(model, pattern))
    return next(found, None)


def has_memory(model: str, layout: str) -> bool:
    """On a stream of single frames."""
    return layout == "BTCHW" and not any(fnmatchcase(model, pattern) for pattern in NO_MEMORY)
