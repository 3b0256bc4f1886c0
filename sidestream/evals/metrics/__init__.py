"""Metrics: what plain answers are worth against plain truth. Each is a function of values, for any run."""

from sidestream.evals.metrics.boxes import Detections, box_ap, box_iou
from sidestream.evals.metrics.keypoints import PCK, pck, points_from_maps
from sidestream.evals.metrics.masks import mask_iou
from sidestream.evals.metrics.top1 import top_1

__all__ = ["PCK", "Detections", "box_ap", "box_iou", "mask_iou", "pck", "points_from_maps", "top_1"]
