"""``sidestream evaluate`` for keypoints: a row per joint by name, and the video of truth and current answers."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sidestream.cli import evaluate_film, main
from sidestream.cli.evaluate_film import film_picture, frame_pck, write_film
from sidestream.cli.evaluate_table import joint_fields, joint_table
from sidestream.data import open_dataset
from sidestream.data.dataset import PLAIN
from sidestream.data.joints import JHMDB_JOINTS
from sidestream.errors import LayoutError
from sidestream.evals.metrics import points_from_maps
from sidestream.evals.streaming import Answer, FrameTruth, Pair, Points, pair, read_answers, read_truth, write_truth
from sidestream.evals.streaming.labelled import LabelledClip, labelled_clips
from sidestream.models import create_model, info_of
from sidestream.models.info import attach_info
from sidestream.models.pretrained import save_pretrained
from sidestream.types import Frame
from sidestream.video import overlay, prepare, read
from sidestream.video.overlay import COLOURS

ORANGE, BLUE = (torch.tensor(colour).float() for colour in COLOURS[:2])
MODEL = ["--model", "keypoint_cnn", "--head", "keypoints", "--weights", "random", "--size", "32"]
SMALL = ["--data", "synthetic", *MODEL, "--num-frames", "2", "--frame-step", "1"]
LIVE = ["--streaming", "--runtime-ms", "60"]
ROOT = Path(__file__).resolve().parent.parent.parent
FRAMES_PER_CLIP = 10
NAN = float("nan")


def evaluated(words: list[str], tmp_path: Path) -> dict[str, Any]:
    assert main(["evaluate", *words, "--json", str(tmp_path / "result.json")]) == 0
    return json.loads((tmp_path / "result.json").read_text())


def rows_of(shown: str) -> dict[str, list[str]]:
    """The last table of the output, by the first cell."""
    table = shown[shown.rindex("| PCK ") :]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in cells}


def test_a_saved_model_is_evaluated_at_its_own_size(tmp_path: Path) -> None:
    """By its folder, frames that are not square: the points that the net itself finds in them."""
    torch.manual_seed(2)
    net = create_model("keypoint_cnn", num_classes=5)
    info = info_of(net)
    assert info is not None
    spec = info.input_spec.replace(size_px=(32, 48), resize_px=None, num_frames=2)
    save_pretrained(attach_info(net, replace(info, input_spec=spec)), tmp_path / "net")
    words = ["--data", "synthetic", "--model", str(tmp_path / "net"), "--head", "keypoints", "--max-clips", "2"]
    evaluated([*words, "--out", str(tmp_path / "out")], tmp_path)
    answers, _ = read_answers(tmp_path / "out" / "offline.jsonl")
    dataset = open_dataset("synthetic", part="test", spec=spec)
    net.eval()
    frame_spec = spec.replace(layout="BCHW", num_frames=1, min_frames=None)
    for clip in labelled_clips(dataset, "keypoints", max_clips=2):
        for frame in clip.frames:
            (found,) = [a for a in answers if (a.clip, a.frame_index) == (clip.key, frame.index)]
            maps = net(prepare(frame, frame_spec)[:, None])[:, 0].detach()
            wanted, _ = points_from_maps(maps, 4.0, window=2)
            assert torch.allclose(found.value.points_P2_px, wanted[0], atol=1e-2)


@pytest.mark.parametrize("live", [[], LIVE, [*LIVE, "--forecast"]], ids=["offline", "live", "forecast"])
def test_a_row_per_joint(live: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated([*SMALL, "--max-clips", "12", *live], tmp_path)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    assert found["pck_normalised_by"].startswith("max(height, width) of the box")
    assert found["pck_normalised_by"] in shown
    rows = rows_of(shown)
    assert list(rows)[2:] == [*found["joints"], "all joints"]
    assert len(found["joints"]) == 5
    assert rows["PCK"][0] == "offline @0.1"
    wanted = [scores[f"pck@{a}_per_joint"] for scores in found["scores"].values() for a in ("0.1", "0.2")]
    assert len(wanted) == 2 + 2 * ("--streaming" in live) + 2 * ("--forecast" in live)
    for number, name in enumerate(found["joints"]):
        assert rows[name] == [f"{each[number]:.4f}" for each in wanted]
    assert len({tuple(row) for row in rows.values()}) > 3
    for scores, cells in zip(found["scores"].values(), zip(*[iter(rows["all joints"])] * 2), strict=True):
        assert cells == (f"{scores['pck@0.1']:.4f}", f"{scores['pck@0.2']:.4f}")


def test_jhmdb_has_its_joints_names(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", "jhmdb", "--root", str(data_dir), *MODEL, "--max-clips", "1", "--out", str(tmp_path)]
    found = evaluated([*words, "--video", "1"], tmp_path)
    assert tuple(found["joints"]) == JHMDB_JOINTS
    assert tuple(rows_of(capsys.readouterr().out))[2:-1] == JHMDB_JOINTS
    truths, about = read_truth(tmp_path / "truth.jsonl")
    assert tuple(about["joints"]) == JHMDB_JOINTS
    assert read(tmp_path / "overlay.mp4").num_frames == len(truths)


def test_a_log_has_names_where_its_header_says_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = evaluated([*SMALL, "--max-clips", "2", *LIVE, "--out", str(tmp_path)], tmp_path)
    log, truth = tmp_path / "answers.jsonl", tmp_path / "truth.jsonl"
    words = ["--log", str(log), "--truth", str(truth)]
    scored = evaluated(words, tmp_path)
    assert scored["joints"] == made["joints"]
    assert scored["scores"]["streaming"] == made["scores"]["streaming"]
    assert read_answers(log)[1]["pck_normalised_by"] == made["pck_normalised_by"]
    head, *lines = log.read_text().splitlines(keepends=True)
    log.write_text(json.dumps(json.loads(head) | {"about": {}}) + "\n" + "".join(lines))
    assert evaluated(words, tmp_path)["joints"] == made["joints"]  # the truth's header says them too
    write_truth(truth, read_truth(truth)[0])
    capsys.readouterr()
    assert evaluated(words, tmp_path)["joints"] == ["0", "1", "2", "3", "4"]
    assert list(rows_of(capsys.readouterr().out))[2:] == ["0", "1", "2", "3", "4", "all joints"]


@pytest.mark.parametrize("names", [None, ["neck"], "ab", [1, 2], 7])
def test_names_that_do_not_fit_are_numbers(names: Any) -> None:
    scores = {"offline": {"pck@0.2": 0.5, "pck@0.2_per_joint": [0.0, 1.0]}}
    assert joint_fields(scores, names)["joints"] == ["0", "1"]
    assert joint_fields(scores, ["a", "b"])["joints"] == ["a", "b"]
    assert joint_fields({"offline": {"top_1": 0.5}}, ["a", "b"]) == {}


def test_a_joint_that_is_never_labelled_has_a_dash() -> None:
    found = {"pck@0.2": 0.5, "pck@0.1": 0.25, "pck@0.2_per_joint": [0.5, None], "pck@0.1_per_joint": [0.25, None]}
    assert rows_of(joint_table(["a", "b"], {"offline": found}))["b"] == ["-", "-"]


def judged_frame(index: int, *, answered: int | None, clip: str = "c") -> Pair:
    """Three points on a line that moves right by 4 pixels a frame; the third is not labelled."""

    def points(frame: int) -> torch.Tensor:
        return torch.tensor([[20.0 + 4 * frame, 30.0], [20.0 + 4 * frame, 70.0], [70.0, 50.0]])

    answer = None
    if answered is not None:
        answer = Answer(
            clip, answered, answered / 25, answered / 25, index / 25, Points(points(answered), torch.ones(3))
        )
    return Pair(
        FrameTruth(clip, index, index / 25, Points(points(index), torch.tensor([1.0, 1, 0]))), answer, index / 25
    )


def grey(index: int, size_px: tuple[int, int] = (100, 120)) -> Frame:
    return Frame(torch.full((*size_px, 3), 128, dtype=torch.uint8), index, index / 25)


def test_a_picture_has_the_truth_where_it_is_and_the_answer_where_it_was() -> None:
    found = film_picture(grey(5), judged_frame(5, answered=2), title="streaming")
    factor = 4  # 100 x 120 is enlarged to 400 x 480, with 100 rows for text below
    assert found.size_px == (500, 480)
    for x, y in ((40, 30), (40, 70)):
        assert found.rgb_HWC[factor * y, factor * x].tolist() == BLUE.tolist()
    for x, y in ((28, 30), (28, 70), (70, 50)):
        assert found.rgb_HWC[factor * y, factor * x].tolist() == ORANGE.tolist()
    colours = found.rgb_HWC[:400].flatten(0, 1)
    num_orange, num_blue = ((colours == colour).all(-1).sum().item() for colour in (ORANGE, BLUE))
    assert num_orange / 3 > 4 * num_blue / 2 > 0  # thick and thin, and the unlabelled truth is not drawn
    assert found.rgb_HWC[400:].float().mean() < 60
    nothing = film_picture(grey(5), judged_frame(5, answered=None), title="streaming").rgb_HWC[:400].flatten(0, 1)
    assert int((nothing == ORANGE).all(-1).sum()) == 0
    assert int((nothing == BLUE).all(-1).sum()) == num_blue


@pytest.mark.parametrize(("answered", "age"), [(5, "0 frames old"), (4, "1 frame old"), (3, "2 frames old")])
def test_how_old_an_answer_is(answered: int, age: str) -> None:
    assert evaluate_film._text(judged_frame(5, answered=answered), "x")["answer"] == f"of frame {answered}, {age}"


def test_pck_of_a_frame() -> None:
    """Labelled box 0 x 40: size 40, right within 4 and 8 pixels; 4 pixels a frame."""
    shares = [frame_pck(judged_frame(5, answered=n)) for n in (5, 4, 3, 2, None)]
    assert [each[0.1].share for each in shares] == [1, 1, 0, 0, 0]
    assert [each[0.2].share for each in shares] == [1, 1, 1, 0, 0]


def test_the_film_has_every_frame_of_the_first_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    found = evaluated([*SMALL, "--max-clips", "3", *LIVE, "--out", str(out), "--video", "2"], tmp_path)
    assert found["video"] == str(out / "overlay.mp4")
    assert f"look at: {out / 'overlay.mp4'}" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["answers.jsonl", "offline.jsonl", "overlay.mp4", "truth.jsonl"]
    film = read(out / "overlay.mp4")
    assert film.num_frames == 2 * FRAMES_PER_CLIP
    assert film.pts_seconds == pytest.approx([n / 25 for n in range(2 * FRAMES_PER_CLIP)], abs=1e-4)
    truths, answers = read_truth(out / "truth.jsonl")[0], read_answers(out / "answers.jsonl")[0]
    pairs = pair(truths, answers)
    data = open_dataset("synthetic", part="test", spec=PLAIN.replace(size_px=(32, 32), num_frames=2))
    frames = [f for record in (data.records[0], data.records[42]) for f in data.frames(record)]
    to_blue, to_grey = [], []
    for n, rgb_HWC in enumerate(film.rgb_THWC):
        assert frames[n].truth is not None
        assert truths[n].value.points_P2_px.equal(frames[n].truth.keypoints_NP2_px[0])  # type: ignore[union-attr]
        wanted = film_picture(frames[n], pairs[n], title="streaming").rgb_HWC
        assert wanted.shape == rgb_HWC.shape == (480, 384, 3)
        assert float((wanted.float() - rgb_HWC.float()).abs().mean()) < 5  # compression
        plain = torch.nn.functional.interpolate(frames[n].rgb_HWC.permute(2, 0, 1)[None].float(), scale_factor=12)[0]
        for x, y in (truths[n].value.points_P2_px * 12).round().int().tolist():  # type: ignore[union-attr]
            if 2 <= x < 382 and 2 <= y < 382:
                to_blue.append(float((rgb_HWC[y, x].float() - BLUE).norm()))
                to_grey.append(float((plain[:, y, x] - BLUE).norm()))
    assert len(to_blue) > 60
    assert float(torch.tensor(to_blue).median()) < 0.6 * float(torch.tensor(to_grey).median())


def test_offline_answers_are_drawn_and_logged(tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluated([*SMALL, "--max-clips", "1", "--out", str(out), "--video", "5"], tmp_path)
    assert sorted(p.name for p in out.iterdir()) == ["offline.jsonl", "overlay.mp4", "truth.jsonl"]
    assert read(out / "overlay.mp4").num_frames == FRAMES_PER_CLIP


def test_a_film_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    clip = LabelledClip("c", tuple(grey(n) for n in range(3)), ())
    pairs = [judged_frame(n, answered=0) for n in range(3)]

    def clips(num_good: int) -> Iterator[LabelledClip]:
        yield from [clip] * num_good
        raise OSError("the disk went away")

    path = tmp_path / "o.mp4"
    with pytest.raises(OSError, match="went away"):
        write_film(path, pairs, clips(1), frame_rate=25.0, title="offline")
    assert list(tmp_path.iterdir()) == []
    assert write_film(path, pairs, [clip], frame_rate=25.0, title="offline") == 3
    before = path.read_bytes()
    with pytest.raises(OSError, match="went away"):
        write_film(path, pairs, clips(2), frame_rate=25.0, title="offline")
    assert [p.name for p in tmp_path.iterdir()] == ["o.mp4"]
    assert path.read_bytes() == before


def test_clips_of_other_sizes_fit_into_the_first_ones(tmp_path: Path) -> None:
    clips = [LabelledClip(k, (grey(0, size),), ()) for k, size in (("a", (100, 120)), ("b", (400, 300)))]
    pairs = [judged_frame(0, answered=0, clip=k) for k in "ab"]
    assert write_film(tmp_path / "o.mp4", pairs, clips, frame_rate=25.0, title="offline") == 2
    assert read(tmp_path / "o.mp4").rgb_THWC.shape == (2, 500, 480, 3)


def test_a_line_width_for_each_object() -> None:
    with pytest.raises(LayoutError, match="1 line_px for 2 objects; give one each"):
        overlay(grey(0), points_NP2_px=torch.zeros(2, 3, 2), line_px=(3,))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SMALL, "--video", "-1"], "--video -1; give a number of clips, 0 or more"),
        ([*SMALL, "--video", "1"], "--video wants a folder for overlay.mp4; give --out"),
        ([*SMALL, "--head", "classes", "--video", "1", "--out", "x"], "--head is classes; give --head keypoints"),
        (["--log", "a", "--truth", "b", "--video", "1"], "which a log does not hold; give --data and --model"),
    ],
)
def test_wrong_inputs_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.count("\n") == 0


def test_the_commands_and_the_example_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (ROOT / "docs" / "streaming_evaluation.md").read_text()
    commands = re.findall(r"^    sidestream evaluate ([^#\n]*)", guide, re.MULTILINE)
    assert len(commands) >= 4
    monkeypatch.chdir(tmp_path)
    for command in commands:
        if "jhmdb" not in command:
            assert main(["evaluate", *shlex.split(command)]) == 0, command
    assert (tmp_path / "judged" / "overlay.mp4").is_file()
    (example,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    exec(example, {})
