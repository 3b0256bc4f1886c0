"""``demo --latency``: schedules against a slow simulation, the picture against the truth, the table against the log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import sidestream.cli.demo_latency as module
import sidestream.cli.demo_latency_film as film_module
from sidestream.circuit.cut import cut
from sidestream.circuit.wiring import pipelined
from sidestream.cli import main
from sidestream.cli.demo_latency import LatencyFlags, demo_latency
from sidestream.cli.demo_latency_lanes import (
    Schedule,
    live_lane,
    measured,
    pipelined_schedule,
    predictive_schedule,
    sequential_schedule,
)
from sidestream.cli.demo_latency_picture import Painter, Scene, newest_answer
from sidestream.cli.demo_latency_subject import draw_boxes, mean_iou, synthetic_subject, visible_boxes
from sidestream.clock import ManualClock
from sidestream.evals.streaming import Boxes, read_answers, read_truth
from sidestream.evals.streaming.pairing import pair
from sidestream.types import Frame
from sidestream.video import overlay, read

NET = "timm/test_resnet"


def rows_of(seed: int, num_stages: int, mean: float) -> list[tuple[Fraction, ...]]:
    """Runtimes in eighths of a frame."""
    chance = np.random.default_rng(seed)
    return [tuple(Fraction(int(n), 8) for n in chance.integers(1, round(16 * mean), num_stages)) for _ in range(40)]


def simulated_by_steps(
    num_frames: int, rows: Sequence[tuple[Fraction, ...]], *, one_at_a_time: bool
) -> list[tuple[int, int, Fraction, Fraction]]:
    """(stage, frame, start, end), in steps of an eighth of a frame: a stage that is free takes what lies before it.

    One at a time: the first stage takes a frame only when none is inside. Else: when it is the slowest stage's time
    since it took the last one.
    """
    num_stages, step = len(rows[0]), Fraction(1, 8)
    waiting: list[list[int]] = [[] for _ in range(num_stages)]  # numbers of the frames taken, in front of each stage
    busy_until = [Fraction(0)] * num_stages
    on: list[int | None] = [None] * num_stages
    taken: list[int] = []
    spans: list[tuple[int, int, Fraction, Fraction]] = []
    may_take, num_done, now = Fraction(0), 0, Fraction(0)
    while now < 4 * num_frames:
        for stage in range(num_stages):
            if on[stage] is not None and busy_until[stage] <= now:
                number = on[stage]
                on[stage] = None
                if stage + 1 < num_stages:
                    waiting[stage + 1].append(number)
                else:
                    num_done += 1
        newest = int(now)
        is_new = newest < num_frames and (not taken or newest > taken[-1])  # the camera shows nothing after the last
        is_allowed = num_done == len(taken) if one_at_a_time else now >= may_take
        if is_new and is_allowed:
            may_take = now + max(rows[len(taken)])
            waiting[0].append(len(taken))
            taken.append(newest)
        for stage in range(num_stages):
            if on[stage] is None and waiting[stage]:
                number = waiting[stage].pop(0)
                on[stage], busy_until[stage] = number, now + rows[number][stage]
                spans.append((stage, taken[number], now, busy_until[stage]))
        now += step
    return spans


def plain(schedule: Schedule, rate: float) -> set[tuple[int, int, Fraction, Fraction]]:
    return {(s.stage, s.frame_index, s.start_seconds * rate, s.end_seconds * rate) for s in schedule.spans}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_stages", "mean"), [(1, 1.0), (3, 0.7), (4, 1.5)])
def test_schedules_equal_a_simulation_step_by_step(seed: int, num_stages: int, mean: float) -> None:
    rows = rows_of(seed, num_stages, mean)
    sequential = sequential_schedule(12, iter(rows), frame_rate=Fraction(25))
    assert plain(sequential, 25) == set(simulated_by_steps(12, rows, one_at_a_time=True))
    pipe = pipelined_schedule(12, iter(rows), frame_rate=Fraction(25))
    assert plain(pipe, 25) == set(simulated_by_steps(12, rows, one_at_a_time=False))
    for schedule in (sequential, pipe):
        last = {s.frame_index: s.end_seconds * 25 for s in schedule.spans if s.stage == num_stages - 1}
        assert last == {w.frame_index: w.ready for w in schedule.works}


def test_a_predictive_schedule_is_the_table_of_the_slides() -> None:
    """Three stages that need half a frame each: a tick per frame, stage j on the frame of j ticks ago."""
    rows = [(Fraction(1, 2),) * 3] * 5
    schedule = predictive_schedule(5, iter(rows), frame_rate=Fraction(1), lags=(0, 1, 2, 2))
    table = {(s.stage, s.start_seconds): s.frame_index for s in schedule.spans}
    assert table == {(j, t): t - j for j in range(3) for t in range(5) if t >= j}
    assert [(w.frame_index, w.ready) for w in schedule.works][:3] == [(n, n + 2 + Fraction(1, 2)) for n in range(3)]


class SteppingClock(ManualClock):
    """Every look at it takes a second."""

    def now(self) -> float:
        self.advance(1.0)
        return super().now()


def small_circuit(num_stages: int) -> object:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(num_stages)]
    net = torch.nn.Sequential(*layers).eval()
    return pipelined(cut(net, torch.rand(1, 3, 16, 16), num_stages=num_stages, costs="uniform"))


def grey_frames(num_frames: int, rate: float) -> list[Frame]:
    return [Frame(torch.full((16, 16, 3), n, dtype=torch.uint8), n, n / rate) for n in range(num_frames)]


def test_stages_are_measured_one_row_per_frame() -> None:
    profile = measured(small_circuit(3), grey_frames(12, 25), prepare=None, seconds=60, clock=SteppingClock())
    assert profile.rows_seconds == ((1.0,) * 3,) * 9  # 12 frames, the first 3 left out
    real = measured(small_circuit(2), grey_frames(12, 25), prepare=None, seconds=0)
    assert len(real.rows_seconds) == 5  # at least 8 frames
    assert all(s >= 0 for row in real.rows_seconds for s in row)
    assert real.mean_seconds > 0


@pytest.mark.parametrize("executor", ["inline", "threads"])
def test_a_live_run_times_what_each_stage_did(executor: str) -> None:
    frames = grey_frames(10, 100)
    lane = live_lane(
        "x", small_circuit(2), frames, answer=lambda out: Boxes(*visible_none()), clip="c", executor=executor,
        prepare=None,
    )  # fmt: skip
    assert lane.answers
    for stage in range(2):
        own = [s for s in lane.spans if s.stage == stage]
        assert [s.frame_index for s in own] == [a.frame_index for a in lane.answers]
        assert all(a.end_seconds <= b.start_seconds for a, b in pairwise(own))
    for answer in lane.answers:
        first, second = (
            next(s for s in lane.spans if (s.stage, s.frame_index) == (k, answer.frame_index)) for k in (0, 1)
        )
        assert answer.pts_seconds - 1e-3 <= answer.arrived_seconds <= first.start_seconds
        assert first.end_seconds <= second.start_seconds
        assert second.end_seconds <= answer.ready_seconds


def visible_none() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)


def test_hidden_shapes_have_no_box_and_colours_keep_to_classes() -> None:
    boxes = visible_boxes(torch.tensor([[0.0, 0, 0, 0], [5, 6, 9, 9]]), torch.tensor([2, 4]))
    assert (boxes.boxes_N4_px.tolist(), boxes.labels_N.tolist()) == ([[5, 6, 9, 9]], [4])
    drawn = draw_boxes(boxes)["boxes_N4_px"]
    assert drawn[4].tolist() == [5, 6, 9, 9]
    assert drawn.count_nonzero() == 4


def flags(out: Path, **changes: object) -> LatencyFlags:
    given = {
        "source": None, "out": out, "model": NET, "weights": None, "head": "classes", "num_classes": None,
        "seconds": 0.8, "stages": "3", "backend": "eager", "frame_rate": 25.0, "slow_motion": 1,
        "timing": "simulated", "predictive": False, "panel_px": (72, 128),
    }  # fmt: skip
    return LatencyFlags(**{**given, **changes})


def slow_profile(monkeypatch: pytest.MonkeyPatch, row: tuple[float, ...] = (0.032, 0.032, 0.032)) -> None:
    from sidestream.evals.streaming import RuntimeProfile

    monkeypatch.setattr(module, "measured", lambda *args, **options: RuntimeProfile((row,)))


def table_in(path: Path) -> dict[str, list[str]]:
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in (cells[0], *cells[2:])}


def iou(a: list[float], b: list[float]) -> float:
    """By counting pixels: boxes of the synthetic clip have whole corners."""
    cells = [{(x, y) for x in range(int(r[0]), int(r[2])) for y in range(int(r[1]), int(r[3]))} for r in (a, b)]
    return len(cells[0] & cells[1]) / len(cells[0] | cells[1])


def test_the_job_from_clip_to_video_logs_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages of 0.8 frames each: one by one a frame takes 2.4, so every third gets in; pipelined, all do."""
    slow_profile(monkeypatch)
    said: list[str] = []
    assert demo_latency(flags(tmp_path), said.append) == 0
    sequential, about = read_answers(tmp_path / "sequential.jsonl")
    pipe, _ = read_answers(tmp_path / "pipelined.jsonl")
    truths, _ = read_truth(tmp_path / "truth.jsonl")
    assert about["is_simulated"]
    assert about["stage_ms"] == pytest.approx([32, 32, 32])
    # by hand: done at 2.4 with frame 2 at hand, at 4.8 with frame 4, 7.2, 9.6, 12 ...
    assert [a.frame_index for a in sequential] == [0, 2, 4, 7, 9, 12, 14, 16, 19]
    assert [a.ready_seconds for a in sequential] == pytest.approx([0.096 * n for n in range(1, 10)])
    assert [a.frame_index for a in pipe] == list(range(20))
    assert [a.ready_seconds - a.pts_seconds for a in pipe] == pytest.approx([0.096] * 20)
    for a in (*sequential, *pipe):
        assert torch.equal(a.value.boxes_N4_px, truths[a.frame_index].value.boxes_N4_px)

    table = table_in(tmp_path / "latency.md")
    assert table[""][-2:] == ["AP", "mean IoU"]
    for name, answers in (("sequential", sequential), ("pipelined, 3 stages", pipe)):
        overlaps, ages = [], []
        for truth in truths:
            known = [a for a in answers if a.ready_seconds <= truth.pts_seconds + 1e-9]
            if known:
                ages.append(1e3 * (truth.pts_seconds - known[-1].pts_seconds))
            seen = dict(zip(known[-1].value.labels_N.tolist(), known[-1].value.boxes_N4_px.tolist())) if known else {}
            for label, box in zip(truth.value.labels_N.tolist(), truth.value.boxes_N4_px.tolist()):
                overlaps.append(iou(box, seen[label]) if label in seen else 0.0)
        row = table[name]
        assert float(row[-1]) == pytest.approx(sum(overlaps) / len(overlaps), abs=6e-4)
        assert float(row[3]) == pytest.approx(sum(ages) / len(ages), rel=0.01)
        assert int(row[1]) == len(answers)
        assert int(row[2]) == 20 - len(answers)
    assert float(table["pipelined, 3 stages"][-1]) > float(table["sequential"][-1])
    assert table["offline (no time taken)"][-2:] == ["1.000", "1.000"]
    assert any("one worker per stage" in line for line in said)
    assert any("oracle" in line for line in said)

    video = read(tmp_path / "latency.mp4")
    assert video.num_frames == 20
    assert video.pts_seconds == pytest.approx([n / 25 for n in range(20)], abs=1e-4)
    assert (tmp_path / "latency.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob("*.part*"))


def test_the_picture_shows_the_truth_of_the_frame_that_the_schedule_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At frame 11, one by one: the answer to frame 7, ready at 9.6; pipelined: to frame 8, ready at 10.4."""
    slow_profile(monkeypatch)
    caught: list[Scene] = []
    monkeypatch.setattr(film_module, "film", lambda scene, path, slow_motion: caught.append(scene) or [])
    demo_latency(flags(tmp_path), lambda text: None)
    scene, subject = caught[0], synthetic_subject(20, 25.0, (72, 128))
    painter = Painter(scene)
    picture = painter.picture(11 / 25)
    top, width = painter.head_px, 128
    for number, expected in enumerate((7, 8)):
        left = painter.gap_px + number * (width + painter.gap_px)
        panel = picture[top : top + 72, left : left + width]
        answers = [overlay(subject.frames[11], **draw_boxes(subject.boxes[n])).rgb_HWC.numpy() for n in range(20)]
        assert [np.array_equal(panel, each) for each in answers].index(True) == expected
        assert newest_answer(scene.lanes[number], 11 / 25).frame_index == expected
    before = painter.picture(0.0)
    assert np.array_equal(before[top : top + 72, painter.gap_px :][:, :width], subject.frames[0].rgb_HWC.numpy())


def test_the_strip_shows_work_and_idleness() -> None:
    """Below each picture: a stage's row has the frame's colour exactly while it works."""
    from sidestream.cli.demo_latency_lanes import Lane, Span
    from sidestream.cli.demo_latency_picture import TRACK, colour_of
    from sidestream.evals.streaming import Answer

    frames = synthetic_subject(16, 25.0, (72, 128)).frames
    nothing = Boxes(*visible_none())
    lane = Lane("x", (Answer("c", 3, 0.12, 0.12, 0.4, nothing),), (Span(0, 3, 0.16, 0.32), Span(1, 3, 0.36, 0.40)), 2)
    painter = Painter(Scene([lane], frames, 25.0, lambda frame, answer: frame, [], (72, 480)))
    picture = painter.picture(0.64)  # the strip shows 0 to 0.64 s
    left, right = painter.gap_px + round(4.6 * painter.text_px), painter.gap_px + 480
    strip = painter.head_px + 72 + painter.state_px

    def at(row: int, seconds: float) -> tuple[int, ...]:
        y = strip + row * painter.row_px + 2  # above the numbers
        return tuple(picture[y, round(left + seconds / 0.64 * (right - left))].tolist())

    working, idle = colour_of(3), TRACK
    assert [at(1, s) for s in (0.10, 0.17, 0.30, 0.34)] == [idle, working, working, idle]
    assert [at(2, s) for s in (0.34, 0.37, 0.42)] == [idle, working, idle]
    assert [at(3, s) for s in (0.38, 0.42, 0.62)] == [idle, working, working]
    assert at(0, 0.13) == working
    assert at(0, 0.17) != working


def test_mean_iou_equals_a_count_of_pixels() -> None:
    chance = np.random.default_rng(0)
    subject = synthetic_subject(6, 25.0, (72, 128))
    truths = subject.truths(subject.boxes)
    from sidestream.evals.streaming import Answer

    moved = [
        Boxes(
            t.value.boxes_N4_px + torch.from_numpy(chance.integers(-9, 9, 2)).repeat(2),
            t.value.scores_N,
            t.value.labels_N,
        )
        for t in truths
    ]
    answers = [Answer("clip", n, n / 25, n / 25, n / 25, value) for n, value in enumerate(moved)]
    expected = [
        iou(a.tolist(), b.tolist())
        for t, m in zip(truths, moved, strict=True)
        for a, b in zip(t.value.boxes_N4_px, m.boxes_N4_px, strict=True)
    ]
    assert mean_iou(pair(truths, answers)) == pytest.approx(sum(expected) / len(expected))


def test_a_file_in_slow_motion_on_the_command_line(tmp_path: Path) -> None:
    """A model without weights, really measured: nothing is drawn and nothing judged; two pictures for each frame."""
    from sidestream.video import SyntheticVideo, write

    pictures = (frame.rgb_HWC for frame in SyntheticVideo(num_frames=6, size_px=(48, 64)))
    clip = write(tmp_path / "c.mp4", pictures, frame_rate=12.5)
    out = tmp_path / "out"
    command = ["demo", "--latency", "--source", str(clip), "--model", NET, "--stages", "2", "--timing", "simulated"]
    assert main([*command, "--slow-motion", "2", "--out", str(out)]) == 0
    video = read(out / "latency.mp4")
    assert video.num_frames == 12
    assert video.pts_seconds[1] == pytest.approx(1 / 12.5, abs=1e-4)
    assert not (out / "truth.jsonl").exists()
    assert table_in(out / "latency.md")[""][-1] == "largest age ms"
    assert json.loads((out / "runtimes.json").read_text())["rows_seconds"]


def test_a_keypoint_model_draws_its_own_answers_on_three_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    from sidestream.models import create_model

    torch.manual_seed(1)
    save_file(create_model("keypoint_cnn", num_classes=5).state_dict(), tmp_path / "w.safetensors")
    slow_profile(monkeypatch)
    out = tmp_path / "out"
    out.mkdir()
    given = {"model": "keypoint_cnn", "weights": str(tmp_path / "w.safetensors"), "num_classes": 5, "seconds": 0.4}
    demo_latency(flags(out, predictive=True, **given), lambda text: None)
    offline = {a.frame_index: a.value for a in read_answers(out / "offline.jsonl")[0]}
    pipe, _ = read_answers(out / "pipelined.jsonl")
    assert len(offline) == len(pipe) == 10
    for a in pipe:
        torch.testing.assert_close(a.value.points_P2_px, offline[a.frame_index].points_P2_px)
    predicted, _ = read_answers(out / "predictive_parallel.jsonl")
    for a in predicted:  # a chain of stages: the answer of tick t is the model's on frame t - 2, judged as of t
        torch.testing.assert_close(a.value.points_P2_px, offline[a.frame_index - 2].points_P2_px)
    assert table_in(out / "latency.md")[""][-1] == "pck@0.2"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--frame-rate", "25"], "give --latency too"),
        (["--latency", "--stages", "1"], "from 2 on"),
        (["--latency", "--stages", "auto"], "from 2 on"),
        (["--latency", "--slow-motion", "0"], "from 1 on"),
        (["--latency", "--frame-rate", "-1"], "above 0"),
        (["--latency", "--predictive"], "give --model and --weights"),
        (["--latency", "--source", "no_such_file.mp4"], "no_such_file.mp4"),
    ],
)
def test_wrong_flags(given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "out"), *given]) == 2
    assert message in capsys.readouterr().err
