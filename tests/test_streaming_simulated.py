"""The streaming benchmark's simulated part: its figures from clips and records whose sums are known by hand."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sidestream.circuit.net_stages import stages_of_net
from sidestream.evals.metrics import points_from_maps
from sidestream.evals.streaming import Answer, FrameTruth, Pair, Points, RuntimeProfile
from sidestream.models import create_model
from sidestream.report.record import read_json_lines

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "streaming"
MODULES = ("run", "judging", "simulated", "synthetic", "table", "plot", "live", "live_nets", "live_report", "control")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a file of the benchmark; what it imported is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARK))
    for name in MODULES:
        sys.modules.pop(name, None)
    yield __import__
    for name in MODULES:
        sys.modules.pop(name, None)


def clip_of(judging: ModuleType, num_frames: int = 24) -> Any:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(num_frames, 3, judging.SIZE_PX, judging.SIZE_PX, generator=generator)
    places = 24 + torch.arange(num_frames)[:, None, None] + 6 * torch.rand(1, 4, 2, generator=generator)
    truths = tuple(Points(p, torch.ones(4)) for p in places)
    return judging.ShownClip("c", frames, (96, 96), truths, 0.1)


def circuit_in_a_row(judging: ModuleType, net: Any) -> Any:
    """The stages called one after the other, without any machine."""
    return stages_of_net(net, torch.zeros(1, 3, judging.SIZE_PX, judging.SIZE_PX))


def test_a_net_in_sequence_answers_with_the_newest_frame_that_it_had_time_for(bench: Any) -> None:
    """Every frame's answer is what the net makes of that frame alone; which one it is follows from the runtimes."""
    judging = bench("judging")
    torch.manual_seed(0)
    net = judging.load(None, "", 4)
    clip = clip_of(judging)
    device = judging.Device(RuntimeProfile(((0.0125,) * 8,)))  # a net of 100 ms: at 25 frames a second 2.5 frames
    judge = judging.Judge(lambda variant: net, device)
    offline, live = judge.pairs("sequential", clip, 0, 25.0)
    assert [p.answer.frame_index for p in offline] == list(range(24))
    assert [p.answer and p.answer.frame_index for p in live][:11] == [None] * 3 + [0, 0, 2, 2, 2, 5, 5, 7]
    with torch.inference_mode():
        maps = circuit_in_a_row(judging, net)(clip.frames_TCHW[7:8])
    points, _ = points_from_maps(maps[0], 4.0, window=2)
    assert torch.allclose(live[10].answer.value.points_P2_px, 2 * points, atol=1e-3)  # 96 pixels are shown as 48
    _, piped = judge.pairs("pipelined", clip, 0, 25.0)
    assert [p.answer and p.answer.frame_index for p in piped] == [None] * 3 + list(range(21))  # 100 ms old, every frame
    for a, b in itertools.product((offline, live, piped), repeat=2):
        for p in (p for p in a if p.answer):
            same = [q.answer.value for q in b if q.answer and q.answer.frame_index == p.answer.frame_index]
            assert all(torch.equal(p.answer.value.points_P2_px, value.points_P2_px) for value in same)


def test_a_net_that_predicts_is_asked_for_the_frame_of_its_tick(bench: Any) -> None:
    judging = bench("judging")
    torch.manual_seed(0)
    net = judging.load(None, "", 4)
    judge = judging.Judge(lambda variant: net, judging.Device(RuntimeProfile(((0.0125,) * 8,))))
    clip = clip_of(judging)
    offline, live = judge.pairs("parallel", clip, 0, 25.0)
    expected = [None] * 7 + list(range(7, 24))
    assert [p.answer and p.answer.frame_index for p in offline] == expected
    assert [p.answer and p.answer.frame_index for p in live] == expected  # ready before its frame is there
    _, grouped = judge.pairs("two groups", clip, 0, 25.0)
    found = [p.answer.frame_index for p in grouped if p.answer]
    assert found[0] > 0  # the first tick has no answer
    assert found == sorted(found)


def test_right_points_are_counted_and_a_missing_answer_has_none(bench: Any) -> None:
    judging = bench("judging")
    truth = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 50.0]])
    near = truth + torch.tensor([[19.0, 0.0], [21.0, 0.0], [0.0, -20.0]])  # a fifth of 100 is 20
    pairs = []
    for n in range(10):
        made = Answer("c", n, n, n, n, Points(near, torch.ones(3))) if n != 9 else None
        pairs.append(Pair(FrameTruth("c", n, n, Points(truth, torch.ones(3))), made, n))
    assert judging.right_of(pairs) == (18, 30)
    tally = judging.Tally()
    tally.add(pairs[:9], pairs)
    assert tally.sums["right"] == 18
    assert tally.sums["points"] == 30
    assert (tally.sums["settled_right"], tally.sums["settled_points"], tally.sums["settled_misses"]) == (2, 6, 1)
    assert (tally.sums["misses"], tally.sums["frames"], tally.sums["mismatch"]) == (1, 10, 0)
    assert not any("centre" in name for name in tally.sums)


def test_the_centre_is_counted_by_itself_on_the_scale_of_the_whole_shape(bench: Any) -> None:
    """Shapes 40 pixels long, so 8 are allowed; by hand, frame by frame."""
    judging = bench("judging")
    outline = torch.tensor([[0.0, 0.0], [-20.0, 0.0], [20.0, 0.0], [0.0, 5.0], [0.0, -5.0]])

    def pairs(ways: dict[int, float | None]) -> list[Pair]:
        """Answers whose centre is so far off, and whose other points are all wrong but the last."""
        off = torch.tensor([[0.0, 0.0], [0.0, 9.0], [0.0, 9.0], [0.0, 9.0], [0.0, 1.0]])
        found = []
        for n, way in ways.items():
            truth = FrameTruth("c", n, n, Points(outline + n, torch.ones(5)))
            answered = outline + n + off + torch.tensor([[way or 0.0, 0.0]] + [[0.0, 0.0]] * 4)
            made = None if way is None else Answer("c", n, n, n, n, Points(answered, torch.ones(5)))
            found.append(Pair(truth, made, n))
        return found

    live = pairs({7: 0.0, 8: 7.9, 9: 8.1, 10: None, 11: -7.0, 12: 30.0})
    offline = pairs({7: 0.0, 8: 0.0, 9: 7.0, 10: 1.0, 11: 0.0, 12: 9.0})
    tally = judging.Tally(0)
    tally.add(offline, live)
    assert [tally.sums[f"settled_centre_{name}"] for name in ("right", "right_offline", "points")] == [2, 4, 5]
    assert [tally.sums[f"settled_{name}"] for name in ("right", "right_offline", "points")] == [2 + 4, 4 + 5, 25]
    tally.add(offline, live)
    assert [tally.sums[f"settled_centre_{name}"] for name in ("right", "right_offline", "points")] == [4, 8, 10]


def test_motion_is_in_sizes_of_the_person_and_bins_are_of_as_many_clips(bench: Any) -> None:
    simulated = bench("simulated")
    box = torch.tensor([[0.0, 0.0], [40.0, 0.0], [0.0, 80.0]])
    still = [Points(box, torch.ones(3))] * 5
    moving = [Points(box + torch.tensor([3.0, 4.0]) * n, torch.ones(3)) for n in range(5)]
    assert simulated.motion_of(still) == 0
    assert simulated.motion_of(moving) == pytest.approx(5 / 80)
    edges = simulated.bins(list(range(16)))
    assert [simulated.bin_of(m, edges) for m in range(16)] == [n // 4 for n in range(16)]


def test_an_endless_stream_on_a_device_of_even_stages(bench: Any) -> None:
    """Eight stages of 12.5 ms at 25 frames a second; figures by hand."""
    simulated = bench("simulated")
    device = simulated.Device(RuntimeProfile(((0.0125,) * 8,)))
    found = {(r["case"]["net"], r["case"]["frame_rate"]): r for r in simulated.timing(device, [])}
    assert set(found) == {
        (n, r) for n in ("sequential", "pipelined", "two groups", "parallel") for r in simulated.RATES
    }
    slow = found["sequential", 25]
    assert slow["answers_per_s"] == pytest.approx(10, rel=0.01)  # 100 ms each
    assert slow["reaction_ms"][0] == pytest.approx(100, abs=21)  # half of them begin half a frame late
    assert sum(slow["busy"]) == pytest.approx(1, abs=0.01)
    piped = found["pipelined", 25]
    assert piped["answers_per_s"] == pytest.approx(25, rel=0.01)
    assert piped["reaction_ms"] == [100.0, 100.0]
    assert piped["busy"] == pytest.approx([25 * 0.0125] * 8, abs=0.01)
    free = found["parallel", 25]
    assert free["ticks"] == (3, 7)
    assert free["reaction_ms"] == [50.0, 50.0]  # four stages on the shortest way
    assert free["in_use_ms"] == [3 * 40.0] * 2  # it speaks of the frame of three ticks later
    assert piped["in_use_ms"] == piped["reaction_ms"]
    assert free["answer_ms"] == [4 * 40 + 50.0] * 2  # the same, four frames later: their newest frame had to come
    known = [r["case"] for r in found.values()]
    assert list(simulated.timing(device, known)) == []


def records() -> list[dict[str, Any]]:
    """Two seeds; the parallel net keeps 0.30 of 0.40 where the one in sequence keeps 0.20, at 30 frames a second."""
    found: list[dict[str, Any]] = []
    rights = {"sequential": {5: 400, 30: 200}, "parallel": {5: 320, 30: 300}, "sequential, forecast": {5: 400, 30: 250}}
    for seed in (0, 1):
        for net, by_rate in rights.items():
            for rate, right in by_rate.items():
                some = {"points": 1000, "right": right - 100, "right_offline": 380, "misses": 5, "frames": 50}
                sums = some | {"mismatch": 90, "settled_points": 500, "settled_right": right // 2 + 5 * seed}
                sums |= {"settled_right_offline": 200, "settled_misses": 0, "clips": 3}
                case = {"seed": seed, "net": net, "frame_rate": rate}
                found.append({"part": "accuracy", "case": case, "motion_bins": [sums, None, sums, sums]})
    return found


def test_the_table_of_records(bench: Any, tmp_path: Path) -> None:
    table = bench("table")
    text = table.write_all(records(), tmp_path)
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == text
    assert (tmp_path / "streaming.png").read_bytes().startswith(b"\x89PNG")
    first = next(line for line in text.splitlines() if line.startswith("| parallel "))
    cells = [c.strip() for c in first.split("|")[2:-1]]
    assert cells == ["40.0 [40.0, 40.0]", "32.5 [32.0, 33.0]", "30.5 [30.0, 31.0]"]
    points = table.points_of(records(), "frame rate")
    assert table.kept(points[30], "parallel") == pytest.approx([0.75, 0.775])
    assert list(table.points_of(records(), "motion")) == [1, 3, 4]  # of bins as of rates the largest is named
    # means over the seeds: 0.305 against 0.205, and against 0.255 with a forecast
    assert "largest gap: 1.49 times at motion 4, parallel against sequential (PCK 30.5 % and 20.5 %)" in text
    assert "goal 2x: not met." in text
    assert "largest gap, each side with its best forecast: 1.20 times" in text
    whole = table.points_of(records(), "frame rate", "")
    assert whole[30]["parallel"][0] == (0.2, 0.38)


def speed_records() -> list[dict[str, Any]]:
    """Two seeds and two speeds. Centres live: parallel 0.6 and 0.3 of 1, with a forecast 0.5 and 0.6, in row 0.2."""
    rights = {  # of 500 points and 100 centres
        "sequential": {1.0: (100, 20), 4.0: (50, 0)},
        "parallel": {1.0: (150, 60), 4.0: (60, 30)},
        "sequential, forecast": {1.0: (120, 50), 4.0: (80, 60)},
    }
    found: list[dict[str, Any]] = []
    for seed in (0, 1):
        for net, by_speed in rights.items():
            for speed, (right, centre) in by_speed.items():
                sums = {"settled_points": 500, "settled_right": right, "settled_right_offline": 200}
                sums |= {"settled_centre_points": 100, "settled_centre_right": centre + 2 * seed}
                sums |= {"settled_centre_right_offline": 80 + 10 * seed}
                case = {"seed": seed, "net": net, "speed": speed}
                found.append({"part": "synthetic", "case": case, **sums})
    return found


def test_the_centre_has_a_block_a_gap_and_a_panel(bench: Any, tmp_path: Path) -> None:
    table = bench("table")
    text = table.write_all(speed_records(), tmp_path)
    block = text.split("### Against speed, the centre alone")[1].split("###")[0]
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in block.splitlines() if line.startswith("| parallel")]
    assert rows[0] == ["parallel", "85.0 [80.0, 90.0]", "85.0 [80.0, 90.0]"]  # offline
    assert rows[1] == ["parallel", "61.0 [60.0, 62.0]", "31.0 [30.0, 32.0]"]  # live
    assert rows[2] == ["parallel", "71.9 [68.9, 75.0]", "36.5 [35.6, 37.5]"]  # 60 / 80, 62 / 90; 30 / 80, 32 / 90
    # of all points 150 / 100; of the centres 31 / 1 in row, and 61 / 51 against a forecast
    assert "largest gap: 1.50 times at speed 1, parallel against sequential (PCK 30.0 % and 20.0 %)" in text
    assert "largest gap, the shapes' centre alone: 31.00 times at speed 4, parallel against sequential" in text
    assert (
        "best forecast, the shapes' centre alone: 1.20 times at speed 1, parallel against sequential, forecast" in text
    )
    ratios = [line for line in text.splitlines() if line.startswith(("| all five points", "| the centre alone"))]
    assert [[c.strip() for c in line.split("|")[2:-1]] for line in ratios] == [
        ["1.25", "0.75"],  # 150 / 120, 60 / 80
        [f"{61 / 51:.2f}", f"{31 / 61:.2f}"],
    ]


def test_records_without_centres_are_reported_as_before(bench: Any, tmp_path: Path) -> None:
    table = bench("table")
    older = [{k: v for k, v in r.items() if "centre" not in k} for r in speed_records()]
    text = table.write_all(older, tmp_path)
    assert "### Against speed: speed of the moving shapes" in text
    assert "centre" not in text
    assert "largest gap: 1.50 times at speed 1" in text


@pytest.mark.filterwarnings("error")
def test_a_picture_is_drawn_of_no_records(bench: Any, tmp_path: Path) -> None:
    plot, table = bench("plot"), bench("table")
    plot.draw({study: {} for study in table.STUDIES}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_accuracies_and_ages_with_the_beginning_are_two_tables(bench: Any) -> None:
    table = bench("table")
    first, second = table.starts(records()).split("\n\n")[1:]
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in (first + "\n" + second).splitlines()]
    assert [row for row in cells if row and row[0].startswith(("all", "frames"))] == [
        ["all frames: PCK@0.2 live, %", "5", "30"],
        ["frames behind", "5", "30"],
    ]
    parallel = [row[1:] for row in cells if row and row[0] == "parallel"]
    assert parallel == [["22.0 [22.0, 22.0]", "20.0 [20.0, 20.0]"], ["2.00", "2.00"]]  # 90 frames over 50 - 5


def test_a_seed_without_weights_is_left_out_and_what_is_known_is_not_measured(
    bench: Any, tmp_path: Path, capsys
) -> None:
    simulated = bench("simulated")
    device = simulated.Device(RuntimeProfile(((0.0125,) * 8,)))
    assert list(simulated.accuracy(device, tmp_path, [3], [], True)) == []
    assert "seed 3: no weights of sequential, two groups, distilled, parallel, distilled in" in capsys.readouterr().out
    known = [{"seed": 3, "net": n, "frame_rate": r} for n in simulated.NETS for r in simulated.RATES]
    assert list(simulated.accuracy(device, tmp_path, [3], known, True)) == []
    assert capsys.readouterr().out == ""


def test_trainings_are_the_variants_that_have_weights_each_in_its_wiring(bench: Any, tmp_path: Path) -> None:
    trainings = bench("trainings")
    for name in ("0-small-parallel, feedback", "0-small-sequential", "0-small-two groups", "1-small-parallel"):
        (tmp_path / name / "run").mkdir(parents=True)
        if name != "0-small-two groups":
            (tmp_path / name / "run" / "last.safetensors").touch()
    found = trainings.nets_in(tmp_path, 0)
    assert {v: (n.weights, n.wiring, n.judged_frame) for v, n in found.items()} == {
        "sequential": ("sequential", "sequential", "answered"),
        "parallel, feedback": ("parallel, feedback", "parallel", "newest"),
    }


def test_table_of_trainings_by_hand(bench: Any) -> None:
    sums = {"settled_points": 200, "frames": 50, "misses": 10}
    found = [
        {"case": {"seed": s, "net": "a"}, "settled_right_offline": 80 + 2 * s, "settled_right": 60 + s, "mismatch": m}
        for s, m in ((0, 20), (1, 30))
    ]
    _, rows = bench("trainings").table_of([sums | record for record in found])
    assert rows == [["a", "40.5 [40.0, 41.0]", "30.2 [30.0, 30.5]", "0.62", "2"]]  # 50 frames over 2 * (50 - 10)


def test_a_net_with_feedback_is_fed_what_the_device_takes(bench: Any) -> None:
    """Its answer is made of earlier ones too, so that it cannot be looked up by its frame."""
    judging, trainings = bench("judging"), bench("trainings")
    device = judging.Device(RuntimeProfile(((0.0125,) * 8,)))

    def net(name: str) -> Any:
        made = create_model(judging.MODEL, num_classes=3, head="keypoints").eval()
        if "feedback" in name:
            made.add_feedback()
        return made

    nets = {v: trainings.Net(v, "sequential", "answered") for v in ("sequential", "sequential, feedback")}
    assert set(judging.Judge(net, device, nets).plain) == {"sequential"}


def test_moving_shapes_carry_their_points_and_double_their_way_with_their_speed(bench: Any) -> None:
    synthetic = bench("synthetic")
    clips = {speed: synthetic.shown(speed, 3) for speed in (0.0, 0.5, 1.0)}
    ways = {
        s: torch.stack([t.points_P2_px for t in c.truths])[:6].mean(1).diff(dim=0).norm(dim=-1)
        for s, c in clips.items()
    }
    assert ways[0.0].max() == 0
    assert ways[1.0].mean() == pytest.approx(2 * float(ways[0.5].mean()), rel=0.1)
    item = synthetic.dataset("train", 0, 4)[1]
    assert item.clip_TCHW.shape == (16, 3, 48, 48)
    assert item.points_TP3.shape == (16, 5, 3)
    videos = [synthetic.Pictures(0).video(r) for r in synthetic.dataset("train", 0, 4).records]
    assert len({v.seed for v in videos}) == 4


def test_the_readme_shows_the_table_of_the_records(bench: Any, tmp_path: Path) -> None:
    table = bench("table")
    found = read_json_lines(BENCHMARK / "results.jsonl")
    newest = {str([r["part"], r["case"]]): r for r in found}
    text = table.write_all(list(newest.values()), tmp_path)
    assert text == (BENCHMARK / "table.md").read_text(encoding="utf-8"), "run.py --report was not run"
    assert text in (BENCHMARK / "README.md").read_text(encoding="utf-8")
    assert "largest gap" in text


def test_the_table_is_put_between_its_marks(bench: Any, tmp_path: Path) -> None:
    table = bench("table")
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- table.md -->\nold\n<!-- end of table.md -->\nb\n", encoding="utf-8")
    text = table.write_all(records(), tmp_path)
    assert readme.read_text(encoding="utf-8") == f"a\n<!-- table.md -->\n\n{text}\n<!-- end of table.md -->\nb\n"


def test_quick_records_do_not_go_among_those_that_are_kept(bench: Any) -> None:
    before = (BENCHMARK / "results.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        bench("run").main(["--quick", "--parts", "timing"])
    assert (BENCHMARK / "results.jsonl").read_bytes() == before
