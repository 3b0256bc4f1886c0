"""Labelled clips: every frame with its truth; JHMDB's joints lie on the person."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data.video_files import make_folder

from sidestream.data import ClipDataset, ClipRecord, open_dataset
from sidestream.data.dataset import PLAIN
from sidestream.errors import InputError
from sidestream.evals.streaming import ClassLabel, Points
from sidestream.evals.streaming.labelled import labelled_clips, num_points


def test_every_frame_of_a_clip_has_its_class():
    dataset = open_dataset("synthetic", part="test")
    clips = list(labelled_clips(dataset, frame_rate=10.0, max_clips=5))
    assert [clip.key for clip in clips] == ["test/0", "test/25", "test/51", "test/76", "test/102"]
    for clip, number in zip(clips, (0, 25, 51, 76, 102), strict=True):
        assert [frame.pts_seconds for frame in clip.frames] == [n / 10.0 for n in range(16)]
        assert [(t.frame_index, t.pts_seconds) for t in clip.truths] == [(n, n / 10.0) for n in range(16)]
        assert all(t.value == ClassLabel(number % 4) and t.clip == clip.key for t in clip.truths)
        assert all(frame.truth is None for frame in clip.frames)  # a model cannot peep


def test_keypoints_of_the_synthetic_set_are_those_of_its_object():
    dataset = open_dataset("synthetic", part="test")
    clip = next(labelled_clips(dataset, "keypoints"))
    drawn = list(dataset.frames(dataset.records[0]))
    assert num_points(dataset) == 5
    for truth, frame, given in zip(clip.truths, drawn, clip.frames, strict=True):
        assert isinstance(truth.value, Points)
        assert frame.truth is not None
        assert torch.equal(truth.value.points_P2_px, frame.truth.keypoints_NP2_px[0])
        assert truth.value.scores_P.tolist() == [1.0] * 5
        assert torch.equal(given.rgb_HWC, frame.rgb_HWC)


def test_a_stretch_of_a_file_is_counted_from_its_start(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, num_clips=1)
    path = sorted(str(p) for p in folder.rglob("*") if p.is_file())[0]
    whole = list(ClipDataset([ClipRecord(path, 0)], ["a"], part="test", spec=PLAIN).frames(ClipRecord(path, 0)))
    times = [frame.pts_seconds for frame in whole]
    assert len(times) >= 5
    record = ClipRecord(path, 0, start_seconds=times[1], end_seconds=times[4])
    part = list(ClipDataset([record], ["a"], part="test", spec=PLAIN).frames(record))
    assert [frame.index for frame in part] == [0, 1, 2]
    assert [frame.pts_seconds for frame in part] == pytest.approx([t - times[1] for t in times[1:4]])
    assert all(torch.equal(a.rgb_HWC, b.rgb_HWC) for a, b in zip(part, whole[1:4], strict=True))


def test_a_set_without_points_says_so(tmp_path: Path) -> None:
    dataset = open_dataset(make_folder(tmp_path, num_clips=1), part="train")
    with pytest.raises(InputError, match="has no keypoints; use jhmdb"):
        next(labelled_clips(dataset, "keypoints"))


def test_jhmdb_joints_are_those_of_the_file_in_pixels_of_the_frames(data_dir: Path) -> None:
    dataset = open_dataset("jhmdb", part="test", root=data_dir)
    with np.load(data_dir / "jhmdb" / "joints_px_609.npz", allow_pickle=False) as arrays:
        for clip in labelled_clips(dataset, "keypoints", max_clips=3):
            points_TP2 = torch.stack([truth.value.points_P2_px for truth in clip.truths])  # type: ignore[union-attr]
            height, width = clip.frames[0].size_px
            expected = torch.from_numpy(arrays[clip.key]).double() * torch.tensor([width / 320, height / 240])
            torch.testing.assert_close(points_TP2.double(), expected[: len(points_TP2)], rtol=1.2e-7, atol=0)


def test_jhmdb_joints_lie_on_the_person(data_dir: Path) -> None:
    dataset = open_dataset("jhmdb", part="test", root=data_dir)
    assert num_points(dataset) == 15
    with np.load(data_dir / "jhmdb" / "masks_160x120_packbits.npz") as masks:
        for clip in labelled_clips(dataset, "keypoints", frame_rate=25.0, max_clips=4):
            packed = masks[clip.key]
            masks_THW = np.unpackbits(packed, axis=1)[:, :19200].reshape(-1, 120, 160)
            assert len(clip.truths) == len(clip.frames) == len(masks_THW)
            inside = []
            for truth, mask_HW in zip(clip.truths, masks_THW, strict=True):
                assert isinstance(truth.value, Points)
                x, y = truth.value.points_P2_px.int().T.numpy()
                inside.append(mask_HW[y.clip(0, 119), x.clip(0, 159)].mean())
            assert np.mean(inside) > 0.8  # of the first 40 clips 0.988 on average; at random it is the mask's share


def test_joints_outside_of_the_picture_are_not_labelled_as_in_training(data_dir: Path) -> None:
    spec = PLAIN.replace(size_px=(120, 160), resize_px=None, num_frames=100, min_frames=1)  # the whole picture
    with np.load(data_dir / "jhmdb" / "joints_px_609.npz") as joints:
        trained = open_dataset("jhmdb", part="test", root=data_dir, spec=spec, with_points=True)
        outside = {
            name: ((joints[name] < 0) | (joints[name] >= (320, 240))).any(-1)
            for name in (record.name for record in trained.records)
        }
    number = max(range(len(trained)), key=lambda n: int(outside[trained.records[n].name].sum()))
    record = trained.records[number]
    clip = next(c for c in labelled_clips(trained, "keypoints") if c.key == record.name)
    assert outside[record.name].any()
    assert not outside[record.name].all()
    points_TP3 = trained[number].points_TP3
    for frame, (truth, hidden_P) in enumerate(zip(clip.truths, outside[record.name], strict=True)):
        assert isinstance(truth.value, Points)
        assert (truth.value.scores_P.numpy() == ~hidden_P).all()
        assert torch.equal(truth.value.scores_P, points_TP3[frame, :, 2])
