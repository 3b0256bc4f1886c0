"""Keypoints: points from heat maps by soft-argmax, and PCK; they live below, where training reaches them too."""

from sidestream.models.heatmaps import PCK, pck, points_from_maps

__all__ = ["PCK", "pck", "points_from_maps"]
