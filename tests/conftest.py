"""Fixtures that every test may use."""

from __future__ import annotations

import os
import signal
import uuid
from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one is no failure
hypothesis.settings.load_profile("any machine")

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread each, here and in what tests start, or the workers fight for cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)  # answers are equal to the bit on as many threads: those of a worker

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background; tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _no_choices_of_others(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What ``auto`` keeps is neither the user's nor another test's."""
    monkeypatch.setenv("SIDESTREAM_CACHE", str(tmp_path_factory.getbasetemp() / f"choices-{uuid.uuid4().hex}"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real videos, labels and weights (``SIDESTREAM_DATA``); tests skip where it is absent."""
    folder = Path(os.environ.get("SIDESTREAM_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist (set SIDESTREAM_DATA)")
    return folder
