"""The live benchmark: its table from records whose sums are known by hand, and what it books of a real run."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.net_stages import net_circuit
from sidestream.circuit.wiring import pipelined
from sidestream.data import open_dataset
from sidestream.engine import run
from sidestream.evals.streaming import Answer, FrameTruth, Pair, Points, pair, run_offline
from sidestream.evals.streaming.judge import points_answer
from sidestream.evals.streaming.labelled import LabelledClip, labelled_clips
from sidestream.models import create_model, info_of
from sidestream.types import Frame

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "streaming"
SIZE_PX, NUM_FRAMES, NUM_POINTS = 32, 24, 3


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARK))
    yield __import__
    for name in ("run", "judging", "live", "live_nets", "live_report", "control", "table", "plot"):
        sys.modules.pop(name, None)


@pytest.fixture
def nets(bench: Any) -> ModuleType:
    return bench("live_nets")


@pytest.fixture
def live(bench: Any) -> ModuleType:
    return bench("live")


@pytest.fixture
def report(bench: Any) -> ModuleType:
    return bench("live_report")


def record(net: str, clip: str, **other: Any) -> dict[str, Any]:
    plain = {
        "part": "live",
        "case": {"rate": 10, "clip": clip, "net": net},
        "reaction_ticks": 4,
        "num_frames": 20,
        "num_taken": 20,
        "num_dropped": 0,
        "num_answers": 20,
        "last_ready_seconds": 2.0,
        "latency_ms": [10.0, 30.0],
        "reaction_ms": [100.0],
        "right": 50,
        "right_offline": 80,
        "num_points": 100,
        "num_paired": 20,
        "mismatch": 10,
        "busy_shares": [0.9, 0.5],
        "our_cores": 1.5,
        "others_cores": 0.1,
    }
    return {**plain, **other}


def test_table_by_hand(report: ModuleType) -> None:
    own = "predictive, 5 groups"
    records = [
        record("sequential, 2 threads", "a"),
        record("sequential, 2 threads", "b", right=30, busy_shares=[0.9, 0.5]),
        record(own, "a", right=70, num_dropped=10, num_answers=10, latency_ms=[50.0]),
        record(own, "b", right=40, num_points=200, last_ready_seconds=6.0, busy_shares=[0.5, 0.1]),
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.live_table(records).splitlines()[2:]]
    assert [row[:2] for row in rows] == [["10", "sequential, 2 threads"], ["10", own]]
    assert rows[0][2:6] == ["80.0", "40.0", "50", ""]  # (50 + 30) of 200
    # (70 + 40) / 300 of 160 / 300; per clip +20 and 20 - 30 = -10 points: mean 5, deviation 21.2 / sqrt(2) = 15
    assert rows[1][2:6] == ["53.3", "36.7", "69", "+5.0 ± 15.0"]
    assert rows[1][6:8] == ["25", "3.8"]  # 10 of 40 frames; 30 answers in 8 s
    assert rows[1][8:10] == ["30 / 48", "100 / 100"]  # of 10, 30, 50
    assert rows[1][10:12] == ["4", "0.50"]
    assert rows[1][12:] == ["60, 20", "1.50 / 0.10"]  # (2 * 90 + 6 * 50) / 8, (2 * 50 + 6 * 10) / 8


def test_the_ceiling_is_the_baseline_on_the_same_clips(report: ModuleType) -> None:
    base = [record("sequential, 2 threads", clip) for clip in "abc"]
    for number, each in enumerate(base):
        each.update(right_offline=10 * number, num_points=40)
    own = [record("predictive, 5 groups", clip) for clip in "bc"]
    assert report.ceiling(own, base) == (10 + 20) / (40 + 40)
    assert report.ceiling(own, base[:2]) is None


def test_plot_is_drawn(report: ModuleType, tmp_path: Path) -> None:
    report.live_plot([record("sequential, 2 threads", "a"), record("predictive, 5 groups", "a")], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_reaction_is_from_the_frame_that_was_seen(live: ModuleType) -> None:
    def answer(frame: int, ready: float) -> Answer:
        return Answer("c", frame, frame / 10, frame / 10, ready, Points(torch.zeros(1, 2), torch.ones(1)))

    taken = [0, 1, 4, 6]
    due = [n / 10 for n in range(7)]
    assert list(live.reactions([answer(4, 0.55)], taken, 0, due)) == pytest.approx([0.15])
    assert list(live.reactions([answer(4, 0.55), answer(6, 0.6)], taken, 2, due)) == pytest.approx([0.55, 0.5])


def test_a_miss_has_no_right_point(live: ModuleType) -> None:
    points_P2 = torch.tensor([[0.0, 0.0], [100.0, 0.0], [50.0, 40.0]])
    far_P2 = points_P2 + torch.tensor([[0.0, 19.0], [0.0, 21.0], [12.0, 12.0]])
    truths = [FrameTruth("c", n, n / 10, Points(points_P2, torch.ones(3))) for n in range(12)]
    answers = [Answer("c", n, n / 10, n / 10, n / 10, Points(far_P2, torch.ones(3))) for n in range(12)]
    pairs = [Pair(t, None if n < 10 else a, 0.0) for n, (t, a) in enumerate(zip(truths, answers, strict=True))]
    assert live.right_of(pairs) == (2 * 2, 12 * 3)  # 20 px are allowed: 19 and 17 are right, 21 is wrong


def test_the_lead_in_runs_up_to_the_clip(nets: ModuleType, clip: LabelledClip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nets, "LEAD_IN", 3)
    found = nets.led_in(clip, 10.0)
    order = [3, 2, 1, *range(NUM_FRAMES)]
    assert [f.index for f in found.frames] == list(range(NUM_FRAMES + 3))
    assert all(torch.equal(f.rgb_HWC, clip.frames[n].rgb_HWC) for f, n in zip(found.frames, order, strict=True))
    assert [t.frame_index for t in found.truths] == list(range(3, NUM_FRAMES + 3))
    assert [t.pts_seconds for t in found.truths] == pytest.approx([n / 10 for n in range(3, NUM_FRAMES + 3)])
    assert [t.value for t in found.truths] == [t.value for t in clip.truths]
    faster = nets.led_in(clip, 20.0)  # the clip is, its lead-in is not
    assert [f.pts_seconds for f in faster.frames] == pytest.approx([0, 0.1, 0.2, *(0.3 + n / 20 for n in range(24))])
    assert [f.index for f in faster.frames] == list(range(NUM_FRAMES + 3))
    assert [t.pts_seconds for t in faster.truths] == pytest.approx([0.3 + n / 20 for n in range(24)])
    monkeypatch.setattr(nets, "LEAD_IN", 99)
    assert len(nets.led_in(clip, 10.0).frames) == 2 * NUM_FRAMES - 1


@pytest.fixture(scope="module")
def clip() -> LabelledClip:
    chance = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (NUM_FRAMES, SIZE_PX, SIZE_PX, 3), generator=chance, dtype=torch.uint8)
    points = torch.rand(NUM_FRAMES, NUM_POINTS, 2, generator=chance) * SIZE_PX
    frames = tuple(Frame(rgb, n, n / 50) for n, rgb in enumerate(pictures))
    truths = tuple(FrameTruth("c", n, n / 50, Points(p, torch.ones(NUM_POINTS))) for n, p in enumerate(points))
    return LabelledClip("c", frames, truths)


@pytest.mark.parametrize("name", ["sequential, 1 thread", "pipelined, 10 stages", "predictive, 5 groups"])
def test_what_is_booked_of_a_run(live: ModuleType, nets: ModuleType, clip: LabelledClip, name: str) -> None:
    net = nets.NETS[name]
    torch.manual_seed(0)
    model = create_model("par_inception_quarter", num_classes=NUM_POINTS, head="keypoints")
    info = info_of(model)
    assert info is not None
    spec = info.input_spec.replace(size_px=(SIZE_PX, SIZE_PX), layout="BCHW", num_frames=1, min_frames=None)
    circuit = net_circuit(model, torch.zeros(1, 3, SIZE_PX, SIZE_PX), net.wiring)
    answers = run_offline(
        circuit, clip.frames, answer=points_answer(spec), clip="c", judged_frame=net.judged_frame, prepare=spec
    )
    found = live.live(circuit, net, clip, spec, offline=pair(clip.truths, answers))
    assert found["num_frames"] == NUM_FRAMES
    assert found["num_taken"] + found["num_dropped"] == NUM_FRAMES
    num_late = net.lag if net.judged_frame == "newest" else 0
    assert found["num_answers"] == max(0, found["num_taken"] - num_late) == len(found["latency_ms"])
    assert found["num_points"] == NUM_FRAMES * NUM_POINTS
    assert all(ms >= 0 for ms in found["latency_ms"])
    assert all(ms >= late for ms, late in zip(found["reaction_ms"], found["latency_ms"], strict=True))
    assert all(ms >= 1e3 * num_late / 50 - 0.1 for ms in found["reaction_ms"])  # seen so many frames ago, or longer
    assert len(found["busy_shares"]) == (2 if net.executor == "threads" else 1)
    assert all(0 < share <= 1 for share in found["busy_shares"])


@pytest.mark.parametrize("rate", [10.0, 50.0])
def test_what_is_booked_begins_with_the_clip(
    live: ModuleType, nets: ModuleType, clip: LabelledClip, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A net that takes no time to speak of, behind a lead-in of 5 frames at 10 a second; all arrive evenly at 10."""
    seen: list[Any] = []
    replayed = live.run_live
    monkeypatch.setattr(live, "run_live", lambda *given, **more: seen.append(replayed(*given, **more)) or seen[-1])
    shown = nets.led_in(replace(clip, frames=clip.frames[:6], truths=clip.truths[:6]), rate)
    net = nets.NETS["sequential, 1 thread"]
    model = create_model("par_inception_quarter", num_classes=NUM_POINTS, head="keypoints")
    info = info_of(model)
    assert info is not None
    spec = info.input_spec.replace(size_px=(SIZE_PX, SIZE_PX), layout="BCHW", num_frames=1, min_frames=None)
    circuit = net_circuit(model, torch.zeros(1, 3, SIZE_PX, SIZE_PX), net.wiring)
    found = live.live(circuit, net, shown, spec, offline=pair(shown.truths, []))
    of_clip = [a for a in seen[0] if a.frame_index >= 5]
    assert len(of_clip) < len(seen[0])  # some of the lead-in were answered
    assert found["num_frames"] == 6
    assert found["num_lead_in"] == [5, len(seen[0]) - len(of_clip)]
    assert found["num_answers"] == found["num_taken"] == 6 - found["num_dropped"] == len(of_clip)
    assert found["latency_ms"] == [round(1e3 * (a.ready_seconds - a.pts_seconds), 1) for a in of_clip]
    assert len(found["reaction_ms"]) == len(of_clip)
    assert found["last_ready_seconds"] == pytest.approx(max(a.ready_seconds for a in of_clip) - 0.5, abs=1e-4)
    assert found["num_points"] == 6 * NUM_POINTS
    assert found["seconds"] >= 0.5 + 5 / rate
    assert all(0 <= share <= 1 for share in found["busy_shares"])


def test_work_before_the_clip_is_not_counted(live: ModuleType) -> None:
    booked = live.Booked()
    booked._spans += [(1, 10.0, 11.0), (2, 10.5, 12.5), (1, 13.0, 14.0)]
    assert booked.shares(2) == pytest.approx([0.5, 0.5])
    assert booked.shares(2, 2.0) == pytest.approx([0.5, 0.25])  # from 12 to 14
    assert booked.shares(3, 9.0) == [0.0] * 3


def test_on_a_gpu_every_thread_has_a_stream_and_waits_for_its_stage(
    live: ModuleType, nets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for the streams: the maps are not read, and the next stage not begun, before their kernels end."""
    seen: list[tuple[str, int]] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            assert device.type == "cuda"
            self.thread = threading.get_ident()

        def __enter__(self) -> None:
            seen.append(("begin", self.thread))

        def __exit__(self, *exc: object) -> None:
            seen.append(("end", self.thread))

        def synchronize(self) -> None:
            seen.append(("wait", self.thread))
            assert self.thread == threading.get_ident()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    modules = [torch.nn.Identity() for _ in range(3)]
    circuit = pipelined(stages_of(modules, torch.zeros(1, 1, 1, 1)))
    frames = [torch.full((1, 1, 1, 1), float(n)) for n in range(20)]
    outputs = list(run(circuit, frames, executor="threads", num_threads=2, rule=live.Booked("cuda")))
    assert [int(out.value) for out in outputs] == list(range(20))
    for thread in {thread for _, thread in seen}:
        own = [what for what, each in seen if each == thread]
        assert own == ["begin", "wait", "end"] * (len(own) // 3)
    assert len({thread for _, thread in seen}) == 2
    assert len(seen) >= 3 * 60


def test_clips_are_of_many_classes_and_the_few_are_among_the_many(
    nets: ModuleType, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIDESTREAM_DATA", str(data_dir))
    dataset = open_dataset("jhmdb", part="test", split=1)

    def chosen(rate: float) -> list[str]:
        return [c.key for c in labelled_clips(dataset, "keypoints", max_clips=nets.num_clips(rate))]

    many, few = chosen(30), chosen(5)
    assert (len(many), len(few)) == (12, 6)
    assert set(few) < set(many)
    assert len({key.partition("/")[0] for key in many}) == 12
    assert [nets.num_clips(rate) for rate in (10, 15, 25, 30)] == [12] * 4
    assert [nets.num_clips(rate, quick=True) for rate in (5, 30)] == [1, 1]


def test_a_process_runs_the_nets_of_its_wait_policy(nets: ModuleType) -> None:
    passive, plain = {"OMP_WAIT_POLICY": "passive", "A": "b"}, {"A": "b"}
    assert [*nets.nets_of_process(plain)] == ["sequential, 2 threads, spinning"]
    assert [*nets.nets_of_process({"OMP_WAIT_POLICY": "ACTIVE"})] == ["sequential, 2 threads, spinning"]
    own = nets.nets_of_process(passive)
    assert set(own) == set(nets.NETS) - {"sequential, 2 threads, spinning"}
    assert nets.other_environment(passive) == plain
    assert nets.other_environment(plain) == {"OMP_WAIT_POLICY": "PASSIVE", "A": "b"}
    assert nets.NETS["sequential, 2 threads, spinning"] == nets.NETS["sequential, 2 threads"]


@pytest.mark.parametrize("is_passive", [False, True])
def test_what_a_process_measures_follows_its_wait_policy(
    live: ModuleType, clip: LabelledClip, monkeypatch: pytest.MonkeyPatch, capsys: Any, is_passive: bool
) -> None:
    """Nothing runs: which nets are asked for, at which rates, and what is printed."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if is_passive:
        monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    for name, replaced in {
        "open_dataset": lambda *given, **more: None,
        "labelled_clips": lambda *given, **more: [clip],
        "warm_up": lambda *given: None,
        "live": lambda *given, **more: {"right": 1, "num_points": 2},
    }.items():
        monkeypatch.setattr(live, name, replaced)
    monkeypatch.setattr(live.Loaded, "circuit", lambda self, net: (None, None))
    monkeypatch.setattr(live.Loaded, "offline", lambda self, net, clip: [])
    found = [(r["case"]["rate"], r["case"]["net"]) for r in live.measure(True, [])]
    nets = [net for rate, net in found if rate == 10]
    assert found == [(rate, net) for rate in (10, 25) for net in nets]
    spinning = "sequential, 2 threads, spinning"
    assert (len(nets), spinning in nets) == ((7, False) if is_passive else (1, True))
    said = capsys.readouterr().out.splitlines()[0]
    assert said == f"OMP_WAIT_POLICY {'is' if is_passive else 'is not'} PASSIVE here: {'; '.join(nets)}"


def test_one_command_starts_the_other_process(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without nets both processes end at once; the one that is started has the other policy, and starts none."""
    run, live = bench("run"), bench("live")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr(live, "measure", lambda *given, **more: iter(()))
    started = []
    monkeypatch.setattr(
        run.subprocess, "run", lambda command, **more: started.append((command, more)) or SimpleNamespace(returncode=0)
    )
    run.main(["--parts", "live", "--quick", "--out", str(tmp_path)])
    ((command, more),) = started
    assert "OMP_WAIT_POLICY" not in more["env"]
    assert command[1].endswith("run.py")
    run.main(command[2:])
    assert len(started) == 1


def test_the_control_against_a_slow_loop(bench: Any, nets: ModuleType) -> None:
    """A net with a memory: its points are drawn to what it has seen before, frame by frame. Pictures hold the truth."""
    control = bench("control")
    num_frames, num_before, keeps = 60, 24, 0.8
    steps = torch.rand(num_frames, NUM_POINTS, 2, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.2
    points = torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 12.0]]) + steps.cumsum(0)
    pictures = torch.zeros(num_frames, NUM_POINTS, 1, 3)
    pictures[:, :, 0, :2] = points
    frames = tuple(Frame(rgb, n, n / 30) for n, rgb in enumerate(pictures))
    truths = tuple(FrameTruth("c", n, n / 30, Points(p, torch.ones(NUM_POINTS))) for n, p in enumerate(points))
    shown = nets.led_in(LabelledClip("c", frames, truths), 30.0)

    def answers(given: Any) -> list[Answer]:
        memory, found = torch.zeros(NUM_POINTS, 2), []
        for frame in given:
            memory = keeps * memory + (1 - keeps) * frame.rgb_HWC[:, 0, :2]
            made = Points(memory, torch.ones(NUM_POINTS))
            found.append(Answer("c", frame.index, frame.pts_seconds, 0.0, 0.0, made))
        return found

    def remembered(order: list[int]) -> torch.Tensor:
        """What the net answers last when it has seen these frames of the clip: the sum written out."""
        ages = torch.arange(len(order) - 1, -1, -1)
        return ((1 - keeps) * keeps ** ages[:, None, None] * points[order]).sum(0)

    def right(order: list[int], n: int) -> int:
        size = float((points[n].amax(0) - points[n].amin(0)).max())
        return sum(float((a - b).norm()) <= 0.2 * size for a, b in zip(remembered(order), points[n], strict=True))

    lead_in = [*range(num_before, 0, -1)]
    every, later = range(0, num_frames, 3), range(6, num_frames, 3)
    expected = {
        "all": sum(right([*lead_in, *range(n + 1)], n) for n in every),
        "thinned": sum(right([*lead_in, *range(0, n + 1, 3)], n) for n in every),
        "all, from frame 6": sum(right([*lead_in, *range(n + 1)], n) for n in later),
        "3 late": sum(right([*lead_in, *range(n - 2)], n) for n in later),
        "5 late": sum(right([*lead_in, *range(n - 4)], n) for n in later),
    }
    assert len(set(expected.values())) == 5  # they do differ here
    found = control.compared(answers, shown)
    assert found["right"] == expected
    assert found["num_points"] == {name: 3 * (20 if name in ("all", "thinned") else 18) for name in expected}
    assert (found["num_lead_in"], found["num_frames"]) == (num_before, num_frames)


def test_the_controls_table_by_hand(bench: Any, report: ModuleType) -> None:
    names = ("all", "thinned", "all, from frame 6", "3 late", "5 late")
    records = [
        {
            "part": "control",
            "case": {"clip": clip},
            "right": dict(zip(names, right, strict=True)),
            "num_points": dict(zip(names, (100, 100, 50, 50, 50), strict=True)),
        }
        for clip, right in {"a": (60, 50, 30, 30, 20), "b": (40, 44, 20, 15, 20)}.items()
    ]
    rows = [[c.strip() for c in line.split("|")[2:-1]] for line in report.control_table(records).splitlines()[2:]]
    assert rows == [
        ["50.0", ""],
        ["47.0", "-3.0 ± 7.0"],  # -10 and +4
        ["50.0", ""],
        ["45.0", "-5.0 ± 5.0"],  # 0 and -10
        ["40.0", "-10.0 ± 10.0"],  # -20 and 0
    ]
    table = bench("table")
    assert table.control([]) == ""
    assert table.control(records).startswith(
        "### What dropping and lateness do, without a clock\n\n| frames 0, 3, 6 ... of 2 clips"
    )


def test_a_net_without_any_answer_has_a_row(report: ModuleType) -> None:
    silent = record("sequential, 2 threads, spinning", "a", num_answers=0, last_ready_seconds=0, latency_ms=[])
    silent |= {"reaction_ms": [], "right": 0, "num_paired": 0, "mismatch": 0}
    lines = report.live_table([record("predictive, 5 groups", "a"), silent, record("sequential, 2 threads", "a")])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()[2:]]
    assert [row[1] for row in rows] == [
        "sequential, 2 threads, spinning",
        "sequential, 2 threads",
        "predictive, 5 groups",
    ]
    assert rows[0][3:8] == ["0.0", "0", "-50.0", "0", "0.0"]
