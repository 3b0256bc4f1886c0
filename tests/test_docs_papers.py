"""``docs/papers.md`` names files that are there, and leaves out none that says which paper it is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`([\w./]+)`", PAGE))
NO_PAPER_OF_THEIRS = {"models/autoencoder.py", "models/vgg8.py"}
"""Nets of our own that name a paper whose layers are not known."""


def test_what_is_named_is_there() -> None:
    assert len(NAMED) > 50
    for name in NAMED:
        place = ROOT / name if name.startswith(("recipes/", "benchmarks/")) else ROOT / "sidestream" / name
        assert place.exists(), name


def test_files_that_begin_with_a_paper_are_named() -> None:
    """A conference and a year in the first lines of a module."""
    venue = r"(ICCV|ECCV|CVPR|NeurIPS|ICML|ICLR|arXiv|PAMI|Nature Communications) \d{4}"
    for path in (ROOT / "sidestream").rglob("*.py"):
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        name = path.relative_to(ROOT / "sidestream").as_posix()
        if re.search(venue, about) and name not in NO_PAPER_OF_THEIRS:
            assert name in NAMED, name
