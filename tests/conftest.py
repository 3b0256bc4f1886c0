"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real videos, labels and weights (``SIDESTREAM_DATA``); tests skip where it is absent."""
    folder = Path(os.environ.get("SIDESTREAM_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist (set SIDESTREAM_DATA)")
    return folder
