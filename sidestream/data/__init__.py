"""Labelled clips: from folders, manifests, known data sets or made up; a map-style data set and a loader."""

from sidestream.data.catalog import CATALOG, open_dataset
from sidestream.data.dataset import ClipDataset, ClipItem, ClipOptions
from sidestream.data.joints import PointSource
from sidestream.data.loader import Batch, Loader
from sidestream.data.record import ClipRecord
from sidestream.data.shapes import synthetic_dataset

__all__ = [
    "CATALOG",
    "Batch",
    "ClipDataset",
    "ClipItem",
    "ClipOptions",
    "ClipRecord",
    "Loader",
    "PointSource",
    "open_dataset",
    "synthetic_dataset",
]
