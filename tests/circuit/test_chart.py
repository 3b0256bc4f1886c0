"""The drawn schedule: the design's own figure, held frames, and a PNG that is one."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from random_circuits import random_stages
from sidestream.circuit.ages import ages
from sidestream.circuit.chart import chart, chart_png, schedule
from sidestream.circuit.wiring import parallel, pipelined, semi_parallel, sequential, with_periods


def rows_of(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[-5:] for line in text.splitlines()}


def test_the_schedule_of_the_design() -> None:
    rows = rows_of(chart(pipelined(random_stages(0, 3, skip_chance=0.5)), num_ticks=5))
    assert rows["tick"] == ["0", "1", "2", "3", "4"]
    assert rows["1"] == ["0", "1", "2", "3", "4"]
    assert rows["2"] == [".", "0", "1", "2", "3"]
    assert rows["3"] == [".", ".", "0", "1", "2"]
    assert rows["answer"] == rows["3"]


def test_the_stream_drains_at_its_end() -> None:
    rows = rows_of(chart(pipelined(random_stages(0, 3)), num_ticks=5, num_frames=2))
    assert rows["1"] == ["0", "1", ".", ".", "."]
    assert rows["3"] == [".", ".", "0", "1", "."]


def test_a_slow_stage_holds_its_frame_in_brackets() -> None:
    rows = rows_of(chart(with_periods(sequential(random_stages(0, 2, skip_chance=0.0)), (1, 3)), num_ticks=5))
    assert rows["2"] == ["0", "(0)", "(0)", "3", "(3)"]


@given(st.integers(0, 1000), st.integers(1, 7), st.integers(1, 12))
def test_in_full_swing_every_node_holds_the_frames_of_its_ages(seed: int, depth: int, tick: int) -> None:
    stages = random_stages(seed, depth)
    for circuit in (sequential(stages), pipelined(stages), parallel(stages), semi_parallel(stages, groups=1)):
        table = schedule(circuit, tick + depth + 1)
        now = tick + depth
        for node, found in enumerate(ages(circuit)):
            assert table[now][node] == {now - age for age in found}


def test_png(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    for name, circuit in {"a": pipelined(random_stages(0, 4)), "b": parallel(random_stages(3, 5))}.items():
        path = chart_png(circuit, tmp_path / f"{name}.png", num_ticks=8)
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(data) > 5000
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.png", "b.png"]  # no .part is left


def test_names_stand_before_their_rows() -> None:
    lines = chart(pipelined(random_stages(0, 2)), num_ticks=2).splitlines()
    assert [re.split(r"\s{2,}", line)[0] for line in lines] == ["tick", "1 s1", "2 s2", "answer"]
