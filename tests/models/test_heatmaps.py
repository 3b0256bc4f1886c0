"""Gaussian targets: against a loop over the cells, and as the inverse of ``points_from_maps``."""

from __future__ import annotations

import math

import pytest
import torch

from sidestream.models.heatmaps import gaussian_maps, points_from_maps


def test_gaussian_maps_cell_by_cell() -> None:
    points_BP2 = torch.tensor([[[9.0, 14.0], [2.0, 2.0], [-5.0, 30.0]]], dtype=torch.float64)
    maps = gaussian_maps(points_BP2, (6, 5), 4.0, sigma_cells=1.5)
    assert maps.shape == (1, 3, 6, 5)
    for p, (x, y) in enumerate(points_BP2[0].tolist()):
        for row in range(6):
            for column in range(5):
                squared_px = (4 * column + 2 - x) ** 2 + (4 * row + 2 - y) ** 2
                assert maps[0, p, row, column] == pytest.approx(math.exp(-squared_px / (2 * 6.0**2)))
    assert maps[0, 1, 0, 0] == 1.0


def test_points_come_back() -> None:
    chance = torch.Generator().manual_seed(0)
    points_BP2 = torch.rand(3, 4, 2, generator=chance, dtype=torch.float64) * 40 + 20
    logits = gaussian_maps(points_BP2, (20, 20), 4.0, sigma_cells=1.0).log()
    torch.testing.assert_close(points_from_maps(logits, 4.0)[0], points_BP2, atol=1e-3, rtol=0)
