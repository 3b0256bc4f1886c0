"""``docs/models.md`` lists every model of our own, with what ``sidestream models --details`` says."""

from __future__ import annotations

import re
from pathlib import Path

from sidestream.models import list_models, model_info

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"


def test_every_own_model_is_in_the_table_as_it_is() -> None:
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 8 and re.fullmatch(r"\w+", cells[0]) and cells[0] != "model":
            rows[cells[0]] = cells
    names = [name for name in list_models() if "/" not in name]
    assert sorted(rows) == sorted(names), "run: sidestream models NAME --details, and put the rows into docs/models.md"
    for name in names:
        spec, row = model_info(name).input_spec, rows[name]
        least = "" if spec.min_frames is None or spec.layout == "BCHW" else f" ({spec.min_frames} or more)"
        assert row[2] == f"{spec.num_frames}{least}"
        assert row[4] == f"{spec.size_px[0]} x {spec.size_px[1]}"
        assert row[5] == ("yes" if spec.causal else "no")
        late = re.search(r"(\d+) ticks late", row[6])
        assert (int(late[1]) if late else 0) == spec.delay_ticks
        assert (row[7] == "yes") == (model_info(name).default_weights is not None)
