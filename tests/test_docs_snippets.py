"""Every Python snippet of the guides runs as it stands, in a folder of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
NEEDS = {"docs/streaming_evaluation.md": "judged"}
"""Guide -> a folder that the commands before its snippet make."""


def snippets() -> list[tuple[str, int, str]]:
    """(guide, line, text)."""
    found = []
    for file in sorted(DOCS.glob("*.md")):
        text = file.read_text(encoding="utf-8")
        for match in re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
            found.append((f"docs/{file.name}", text.count("\n", 0, match.start()) + 1, match[1]))
    return found


def test_there_are_some() -> None:
    assert len(snippets()) >= 8


@pytest.mark.parametrize(("guide", "line", "text"), snippets(), ids=lambda v: str(v) if len(str(v)) < 40 else "")
def test_a_snippet_runs(guide: str, line: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if guide in NEEDS:
        from sidestream.cli import main

        words = "--data synthetic --model keypoint_cnn --head keypoints --weights random --size 48 --max-clips 1"
        assert main(["evaluate", *words.split(), "--streaming", "--runtime-ms", "60", "--out", NEEDS[guide]]) == 0
    exec(compile("\n" * line + text, guide, "exec"), {"__name__": "__main__"})
