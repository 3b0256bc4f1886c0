"""Keypoints of clips: they follow resize, crop and mirroring, as dots that are drawn into the pictures do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sidestream.data import ClipDataset, ClipOptions, ClipRecord, Loader, PointSource, open_dataset
from sidestream.data.joints import JHMDB_JOINTS, points_of_clip
from sidestream.data.pictures import file_pictures
from sidestream.errors import InputError
from sidestream.types import InputSpec

HEIGHT, WIDTH, NUM_FRAMES = 90, 120, 12
RIGHT, LEFT = 0, 1


def dots(index: int) -> Tensor:
    """The middles of two dots, red and green, x and y in pixels: they move, apart from each other."""
    return torch.tensor([[30.0 + index, 28.0 + 2 * index], [88.0 - 2 * index, 60.0 - 2 * index]])


def pictures(record: ClipRecord, from_seconds: float) -> Iterator[tuple[Tensor, float]]:
    ys, xs = torch.arange(HEIGHT).view(-1, 1) + 0.5, torch.arange(WIDTH).view(1, -1) + 0.5
    for index in range(NUM_FRAMES):
        rgb_HWC = torch.zeros(HEIGHT, WIDTH, 3)
        for channel, (x, y) in enumerate(dots(index).tolist()):
            rgb_HWC[..., channel] = 255.0 * ((xs - x).square() + (ys - y).square() <= 36)
        yield rgb_HWC.to(torch.uint8), index / 25


SOURCE = PointSource(
    lambda record: (
        torch.stack([dots(n) for n in range(NUM_FRAMES)]) / torch.tensor([WIDTH, HEIGHT])
        if record.key != "bare"
        else None
    ),
    ("right", "left"),
    ((RIGHT, LEFT),),
)


def data_of(spec: InputSpec, part: str = "train", **options: bool) -> ClipDataset:
    records = [ClipRecord(f"made/{n}", 0, key="bare" if n == 1 else str(n)) for n in range(4)]
    return ClipDataset(
        records, ["a"], part=part, spec=spec, options=ClipOptions(**options), open_pictures=pictures, points=SOURCE
    )


def found_dots(frame_CHW: Tensor) -> Tensor:
    """The centroid of what is red, and of what is green."""
    height, width = frame_CHW.shape[1:]
    ys, xs = torch.arange(height).view(-1, 1) + 0.5, torch.arange(width).view(1, -1) + 0.5
    return torch.stack(
        [torch.stack([(c * xs).sum() / c.sum(), (c * ys).sum() / c.sum()]) for c in frame_CHW[:2].double()]
    )


SPECS = [
    InputSpec((48, 64), mean=(0,) * 3, std=(1,) * 3, layout="BTCHW", num_frames=3, frame_step=2),
    InputSpec((70, 80), resize_px=80, mean=(0,) * 3, std=(1,) * 3, layout="BTCHW", num_frames=3),
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("options", [{}, {"random_crop": True}, {"random_flip": True, "random_crop": True}])
def test_points_lie_on_the_dots(spec: InputSpec, options: dict[str, bool]) -> None:
    data = data_of(spec, **options)
    num_mirrored = num_seen = 0
    for epoch in range(8):
        for index in range(len(data)):
            item = data.item(index, epoch)
            assert item.points_TP3 is not None
            assert item.points_TP3.shape == (3, 2, 3)
            for frame_CHW, points_P3 in zip(item.clip_TCHW, item.points_TP3, strict=True):
                seen = found_dots(frame_CHW)
                border = torch.minimum(seen, torch.tensor(spec.size_px[::-1]) - seen).min()
                if frame_CHW[:2].amax((1, 2)).min() < 0.9 or border < 8:
                    continue  # a dot is cut off
                num_seen += 1
                is_mirrored = bool(seen[RIGHT, 0] > seen[LEFT, 0])
                num_mirrored += is_mirrored
                wanted = seen.flip(0) if is_mirrored else seen  # what was his right hand is a left one in the mirror
                torch.testing.assert_close(points_P3[:, :2].double(), wanted, atol=0.3, rtol=0)
                assert points_P3[:, 2].tolist() == [1, 1]
    assert num_seen > 10
    assert (num_mirrored > 3) == ("random_flip" in options)


def test_which_frames_and_which_points_are_visible() -> None:
    points_FP2 = torch.tensor([[[0.5, 0.5], [0.05, 0.5]], [[0.5, 0.99], [1.2, 0.5]]])
    found = points_of_clip(
        points_FP2, [1, 0, 0, 5], picture_px=(100, 200), corner_px=(10, 20), size_px=(80, 160), swaps=None
    )
    assert torch.allclose(found[:3, :, :2], torch.tensor([[[80.0, 89], [220, 40]], *[[[80.0, 40], [-10, 40]]] * 2]))
    assert found[..., 2].tolist() == [[0, 0], [1, 0], [1, 0], [0, 0]], "outside below, right, left; beyond the last"


def test_records_without_points_are_left_out_and_batches_hold_the_others() -> None:
    data = data_of(SPECS[0], part="test")
    assert [record.name for record in data.records] == ["0", "2", "3"]
    assert len(data.with_part("train")) == 3
    batch = next(Loader(data, batch_size=3, num_workers=1).batches(0))
    assert batch.points_BTP3 is not None
    assert batch.points_BTP3.equal(torch.stack([data[n].points_TP3 for n in range(3)]))  # type: ignore[arg-type]
    assert next(Loader(open_dataset("synthetic"), batch_size=2).batches(0)).points_BTP3 is None


def test_the_synthetic_points_are_those_of_its_shape() -> None:
    data = open_dataset("synthetic", part="test", with_points=True, spec=SPECS[0].replace(frame_step=1))
    for index in (0, 5):
        item, frames = data[index], list(data.frames(data.records[index]))
        starts = [n for n in range(len(frames)) if frames[n].pts_seconds == item.pts_seconds[0]]
        truths = [frames[starts[0] + n].truth for n in range(3)]
        wanted = torch.stack([truth.keypoints_NP2_px[0] for truth in truths if truth is not None])
        assert item.points_TP3 is not None
        torch.testing.assert_close(item.points_TP3[..., :2], wanted)


def test_sets_without_points_refuse(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="weizmann has no keypoints; those with keypoints are jhmdb, synthetic"):
        open_dataset("weizmann", with_points=True, root=tmp_path)
    (tmp_path / "jhmdb").mkdir()
    with pytest.raises(InputError, match=r"has no joints_px_609\.npz"):
        open_dataset("jhmdb", with_points=True, root=tmp_path)


def test_jhmdb(data_dir: Path) -> None:
    """All 609 clips with joints, by the official split; halved for pictures of 160 x 120."""
    spec = InputSpec((120, 160), mean=(0,) * 3, std=(1,) * 3, layout="BTCHW", num_frames=4)
    parts = [open_dataset("jhmdb", part=p, spec=spec, root=data_dir, with_points=True) for p in ("train", "test")]
    everything = [open_dataset("jhmdb", part=p, spec=spec, root=data_dir) for p in ("train", "test")]
    with np.load(data_dir / "jhmdb/joints_px_609.npz") as arrays:
        for data, whole in zip(parts, everything, strict=True):
            assert [r.name for r in data.records] == [r.name for r in whole.records if r.name in arrays.files]
        assert sum(map(len, parts)) == len(arrays.files) == 609
        item = parts[0][7]
        times = [seconds for _, seconds in file_pictures(parts[0].records[7], 0.0)]
        numbers = [times.index(seconds) for seconds in item.pts_seconds]
        assert numbers[0] > 0
        wanted = torch.from_numpy(arrays[item.key][numbers]) / 2
    assert item.points_TP3 is not None
    torch.testing.assert_close(item.points_TP3[..., :2], wanted, atol=1e-3, rtol=0)
    assert parts[0].points is not None
    assert parts[0].points.names == JHMDB_JOINTS
    for a, b in parts[0].points.swaps:
        assert (JHMDB_JOINTS[a][0], JHMDB_JOINTS[b][0]) == ("r", "l")
        assert JHMDB_JOINTS[a][1:] == JHMDB_JOINTS[b][1:]
