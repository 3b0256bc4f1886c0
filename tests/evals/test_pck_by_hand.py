"""PCK against counts by hand: two made-up frames with the sums in the comments, and real clips of JHMDB in a loop."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sidestream.cli import main
from sidestream.data import open_dataset
from sidestream.evals.metrics import pck
from sidestream.evals.streaming import (
    Answer,
    FrameTruth,
    Points,
    pair,
    read_answers,
    read_truth,
    score,
    write_answers,
    write_truth,
)
from sidestream.evals.streaming.labelled import labelled_clips

CLIP = "clip"
TRUTH = torch.tensor([
    [[0.0, 0.0], [30.0, 0.0], [0.0, 40.0]],  # box 30 x 40: size 40; right within 4 (alpha 0.1) and 8 (alpha 0.2)
    [[10.0, 10.0], [30.0, 15.0], [99.0, 99.0]],  # joint 2 unlabelled: box 20 x 5: size 20; within 2 and 4
])  # fmt: skip
LABELLED = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
ANSWERS = torch.tensor([
    [[0.0, 4.0], [33.0, 4.0], [0.0, 48.5]],  # off by 4: on the border of 0.1; by 5 (3, 4): 0.2 only; by 8.5: neither
    [[10.0, 14.0], [30.0, 15.0], [99.0, 99.0]],  # off by 4: on the border of 0.2; by 0: both; exact, but does not count
])  # fmt: skip
BY_HAND = {  # (right, labelled) for each joint
    0.1: ((1, 2), (1, 2), (0, 1)),
    0.2: ((2, 2), (2, 2), (0, 1)),
}


def test_two_frames_by_hand() -> None:
    for alpha, per_joint in BY_HAND.items():
        found = pck(ANSWERS, TRUTH, alpha=alpha, labelled_NP=LABELLED > 0)
        assert found.per_joint == per_joint
        assert (found.num_right, found.num_points) == (sum(r for r, _ in per_joint), 5)


def test_two_frames_by_hand_through_log_and_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truths = [FrameTruth(CLIP, n, n / 25, Points(TRUTH[n], LABELLED[n])) for n in range(2)]
    answers = [Answer(CLIP, n, n / 25, n / 25, n / 25, Points(ANSWERS[n], torch.ones(3))) for n in range(2)]
    write_truth(tmp_path / "t.jsonl", truths)
    write_answers(tmp_path / "a.jsonl", answers, about={"joints": ["neck", "left | hand", "knee"]})
    words = ["evaluate", "--log", str(tmp_path / "a.jsonl"), "--truth", str(tmp_path / "t.jsonl")]
    assert main([*words, "--json", str(tmp_path / "r.json")]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["joints"] == ["neck", "left | hand", "knee"]
    for scores in found["scores"].values():
        assert scores["pck@0.1_per_joint"] == [1 / 2, 1 / 2, 0.0]
        assert scores["pck@0.2_per_joint"] == [1.0, 1.0, 0.0]
        assert (scores["pck@0.1"], scores["pck@0.2"]) == (2 / 5, 4 / 5)
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("| neck ")] == [
        "| neck         |       0.5000 | 1.0000 |         0.5000 | 1.0000 |"
    ]
    assert "| all joints   |       0.4000 | 0.8000 |" in shown


SEED = 5
NUM_CLIPS = 6
NOISE_PX = 9.0


def official_test_clips(data_dir: Path, joints: Any) -> list[str]:
    """The clips with joints whose line in the official lists of split 1 ends in 2."""
    names = []
    for file in sorted((data_dir / "jhmdb" / "splits").glob("*_test_split1.txt")):
        action = file.name[: -len("_test_split1.txt")]
        for line in file.read_text().split("\n"):
            if line.strip():
                video, part = line.split()
                if part == "2" and f"{action}/{video[: -len('.avi')]}" in joints.files:
                    names.append(f"{action}/{video[: -len('.avi')]}")
    return names


def is_inside(x: float, y: float) -> bool:
    """Of a picture of 160 x 120; one joint in eight of JHMDB's lies outside, where nobody can see it."""
    return 0 <= x < 160 and 0 <= y < 120


def count_in_a_loop(answers_NP2: Any, truth_NP2: Any, alpha: float) -> list[tuple[int, int]]:
    """For each joint how often it is right and how often it is visible, from the definition."""
    right, visible = [0] * 15, [0] * 15
    for answer_P2, true_P2 in zip(answers_NP2.tolist(), truth_NP2.tolist(), strict=True):
        seen = [(x, y) for x, y in true_P2 if is_inside(x, y)]
        xs, ys = [x for x, _ in seen], [y for _, y in seen]
        for joint, ((x, y), (true_x, true_y)) in enumerate(zip(answer_P2, true_P2, strict=True)):
            if not is_inside(true_x, true_y):
                continue
            visible[joint] += 1
            size = max(max(ys) - min(ys), max(xs) - min(xs))
            if math.sqrt((x - true_x) ** 2 + (y - true_y) ** 2) <= alpha * size:
                right[joint] += 1
    return list(zip(right, visible, strict=True))


@pytest.fixture(scope="module")
def joints(data_dir: Path) -> Any:
    if not (data_dir / "jhmdb" / "joints_px_609.npz").is_file():
        pytest.skip(f"no JHMDB joints in {data_dir}")
    with np.load(data_dir / "jhmdb" / "joints_px_609.npz", allow_pickle=False) as arrays:
        yield arrays


def test_the_test_part_is_that_of_the_official_lists(data_dir: Path, joints: Any) -> None:
    names = official_test_clips(data_dir, joints)
    assert len(names) > 100
    for with_points in (True, False):
        data = open_dataset("jhmdb", part="test", split=1, root=data_dir, with_points=with_points)
        assert [r.name for r in data.records if r.name in joints.files] == names
    other = open_dataset("jhmdb", part="test", split=2, root=data_dir, with_points=True)
    assert [r.name for r in other.records] != names


def test_the_truth_is_the_file_halved(data_dir: Path, joints: Any) -> None:
    """Pictures are 160 x 120; the file is in pixels of 320 x 240."""
    data = open_dataset("jhmdb", part="test", split=1, root=data_dir)
    clips = list(labelled_clips(data, "keypoints", max_clips=NUM_CLIPS))
    assert len(clips) == NUM_CLIPS
    assert {clip.key for clip in clips} <= set(official_test_clips(data_dir, joints))
    for clip in clips:
        assert clip.frames[0].size_px == (120, 160)
        assert len(clip.frames) == len(clip.truths) == len(joints[clip.key])
        for truth, true_P2 in zip(clip.truths, joints[clip.key], strict=True):
            assert isinstance(truth.value, Points)
            np.testing.assert_allclose(truth.value.points_P2_px.numpy(), true_P2 / 2, rtol=0, atol=1e-4)


def test_pck_of_noisy_joints_is_the_count_of_a_loop(data_dir: Path, joints: Any, tmp_path: Path) -> None:
    """Answers: the true joints and noise that grows from joint to joint, so that every joint has its own count."""
    names = official_test_clips(data_dir, joints)
    chance = np.random.default_rng(SEED)
    truths, answers, true_ones, given_ones = [], [], [], []
    for name in names[:: len(names) // NUM_CLIPS][:NUM_CLIPS]:
        for frame, true_P2 in enumerate(joints[name] / 2):
            noise_P2 = chance.normal(size=(15, 2)) * NOISE_PX * np.linspace(0.3, 1.7, 15)[:, None]
            answer_P2 = (true_P2 + noise_P2).astype(np.float32)
            due, ones = frame / 25, torch.ones(15)
            seen = torch.tensor([float(is_inside(x, y)) for x, y in true_P2.tolist()])
            truths.append(FrameTruth(name, frame, due, Points(torch.from_numpy(true_P2), seen)))
            answers.append(Answer(name, frame, due, due, due, Points(torch.from_numpy(answer_P2), ones)))
            true_ones.append(true_P2)
            given_ones.append(answer_P2)
    true_NP2, given_NP2 = (np.stack(each).astype(np.float64) for each in (true_ones, given_ones))
    write_truth(tmp_path / "truth.jsonl", truths)
    write_answers(tmp_path / "answers.jsonl", answers)
    scores = score(pair(read_truth(tmp_path / "truth.jsonl")[0], read_answers(tmp_path / "answers.jsonl")[0]))
    labelled_NP = torch.tensor([[is_inside(x, y) for x, y in true_P2] for true_P2 in true_NP2.tolist()])
    for alpha in (0.1, 0.2):
        counted = count_in_a_loop(given_NP2, true_NP2, alpha)
        assert 100 < min(visible for _, visible in counted) < max(visible for _, visible in counted)
        assert len({right for right, _ in counted}) > 10
        found = pck(torch.from_numpy(given_NP2), torch.from_numpy(true_NP2), alpha=alpha, labelled_NP=labelled_NP)
        assert found.per_joint == tuple(counted)
        assert scores[f"pck@{alpha}_per_joint"] == [right / visible for right, visible in counted]
        num_right, num_visible = (sum(each) for each in zip(*counted, strict=True))
        assert (found.num_right, found.num_points) == (num_right, num_visible)
        assert scores[f"pck@{alpha}"] == num_right / num_visible
