"""``ClipDataset``: type, range and times of every item; the same frames as ``read`` and ``prepare`` give."""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from data.video_files import make_video

import sidestream.data.pictures as pictures
from sidestream.data import ClipDataset, ClipOptions, ClipRecord, open_dataset, synthetic_dataset
from sidestream.data.dataset import PLAIN
from sidestream.data.pictures import PictureStore
from sidestream.errors import InputError, LayoutError, SourceError
from sidestream.types import Clip, InputSpec
from sidestream.video import prepare, read

SPEC = InputSpec(size_px=(32, 32), resize_px=36, layout="BTCHW", num_frames=5, frame_step=2)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("clips") / "one.mp4", num_frames=30)


def of(video: Path, *, part="test", spec: InputSpec = SPEC, start=None, end=None, **options) -> ClipDataset:
    record = ClipRecord(str(video), 1, start, end)
    return ClipDataset([record], ["a", "b"], part=part, spec=spec, options=ClipOptions(**options))


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
@pytest.mark.parametrize("spec", [SPEC, SPEC.replace(resize_px=None), SPEC.replace(interpolation="bicubic")])
def test_the_centred_clip_is_what_read_and_prepare_give(video: Path, spec: InputSpec, cache_bytes: int) -> None:
    clip = read(video)
    start = (30 - 8 - 1) // 2
    chosen = [start, start + 2, start + 4, start + 6, start + 8]
    wanted = prepare(Clip(clip.rgb_THWC[chosen], tuple(clip.pts_seconds[i] for i in chosen)), spec)[0]
    data = of(video, spec=spec, cache_bytes=cache_bytes)
    for _ in range(2):  # decoded, then from the cache or found by its time
        item = data[0]
        assert item.clip_TCHW.equal(wanted)
        assert item.clip_TCHW.dtype == torch.float32
        assert item.pts_seconds == tuple(clip.pts_seconds[i] for i in chosen)
        assert (item.label, item.key) == (1, str(video))


def test_without_a_model_values_are_pixels(video: Path) -> None:
    clip_TCHW = of(video, spec=PLAIN)[0].clip_TCHW
    assert clip_TCHW.shape == (8, 3, 64, 64)
    assert 0 <= clip_TCHW.min() < clip_TCHW.max() <= 1


def test_a_stretch_is_addressed_by_time(video: Path) -> None:
    item = of(video, start=0.4, end=0.8, spec=SPEC.replace(frame_step=1, num_frames=10))[0]
    assert item.pts_seconds == pytest.approx([0.4 + 0.04 * n for n in range(10)])
    with pytest.raises(SourceError, match=r"no frame from 7\.0 to 8\.0 s"):
        of(video, start=7.0, end=8.0)[0]


def test_a_video_too_large_to_hold_is_read_by_time(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [of(video, part="train").item(0, epoch) for epoch in range(8)]
    monkeypatch.setattr(pictures, "MAX_BYTES_AT_ONCE", 1000)
    data = of(video, part="train")
    for epoch, item in enumerate(wanted):
        again = data.item(0, epoch)
        assert again.clip_TCHW.equal(item.clip_TCHW)
        assert again.pts_seconds == item.pts_seconds
    assert data.num_cached_bytes == 0


def test_short_stretches_hold_their_last_frame_or_loop(video: Path) -> None:
    spec = SPEC.replace(frame_step=1, num_frames=6)
    held = of(video, start=0.0, end=0.16, spec=spec)[0]
    looped = of(video, start=0.0, end=0.16, spec=spec, short="loop")[0]
    assert held.pts_seconds == pytest.approx([0, 0.04, 0.08, 0.12, 0.12, 0.12])
    assert looped.pts_seconds == pytest.approx([0, 0.04, 0.08, 0.12, 0, 0.04])
    assert held.clip_TCHW[5].equal(held.clip_TCHW[3])
    assert looped.clip_TCHW[5].equal(looped.clip_TCHW[1])


def test_random_starts_cover_all_and_are_functions_of_seed_epoch_and_index(video: Path) -> None:
    data, again, other = of(video, part="train"), of(video, part="train"), of(video, part="train", seed=1)
    starts = [data.item(0, epoch).pts_seconds[0] for epoch in range(300)]
    assert starts[::-1] == [again.item(0, epoch).pts_seconds[0] for epoch in range(299, -1, -1)]
    assert starts != [other.item(0, epoch).pts_seconds[0] for epoch in range(300)]
    assert {round(start / 0.04) for start in starts} == set(range(22))  # each is missed with probability 1e-6
    again.set_epoch(7)
    assert again[0].pts_seconds[0] == starts[7]


def test_random_crops_and_flips_are_parts_of_the_picture(video: Path) -> None:
    """Every augmented clip is the enlarged one shifted by some corner, mirrored or not, and all frames alike."""
    spec = SPEC.replace(resize_px=None, size_px=(14, 14), mean=(0, 0, 0), std=(1, 1, 1), num_frames=30, frame_step=1)
    whole = prepare(read(video), spec.replace(size_px=(16, 16)))[0]
    data = of(video, part="train", spec=spec, random_crop=True, random_flip=True)
    seen = set()
    for epoch in range(120):
        clip = data.item(0, epoch).clip_TCHW
        for mirrored, source in ((False, clip), (True, clip.flip(-1))):
            for top in range(3):
                for left in range(3):
                    if source.equal(whole[..., top : top + 14, left : left + 14]):
                        seen.add((mirrored, top, left))
    assert len(seen) == 18
    assert data.item(0, 5).clip_TCHW.equal(data.item(0, 5).clip_TCHW)


def test_the_test_part_is_not_augmented(video: Path) -> None:
    data = of(video, random_crop=True, random_flip=True)
    assert data.item(0, 0).clip_TCHW.equal(of(video).item(0, 9).clip_TCHW)
    assert of(video, part="train").with_part("test")[0].clip_TCHW.equal(data[0].clip_TCHW)


def test_several_test_clips_of_a_record(video: Path) -> None:
    data = of(video, num_clips=3)
    assert len(data) == 3
    assert [round(data[n].pts_seconds[0] / 0.04) for n in range(3)] == [0, 10, 21]
    assert data[-1].pts_seconds == data[2].pts_seconds
    with pytest.raises(IndexError):
        data[3]


def test_the_cache_keeps_its_bound() -> None:
    records = [ClipRecord(str(n), 0) for n in range(4)]

    def open_pictures(record: ClipRecord, from_seconds: float):
        yield from ((torch.full((4, 4, 3), int(record.path), dtype=torch.uint8), 0.1 * n) for n in range(5))

    store = PictureStore(resized_px=lambda size: size, open_pictures=open_pictures, cache_bytes=2 * 5 * 48)
    for record in [*records, *records]:
        rgb_THWC, times = store.fetch(record, lambda times: range(len(times)))
        assert rgb_THWC.unique().tolist() == [int(record.path)]
        assert len(times) == 5
    assert store.num_cached_bytes == 2 * 5 * 48


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"start": 2.0, "end": 1.0}, InputError, "leave nothing"),
        ({"part": "dev"}, InputError, "expected 'train' or 'test'"),
        ({"short": "stretch"}, InputError, "expected 'repeat' or 'loop'"),
        ({"num_clips": 0}, InputError, "num_clips=0"),
        ({"frame_rate": 0.0}, InputError, r"frame_rate=0\.0"),
        ({"frame_rate": -25.0}, InputError, r"frame_rate=-25\.0"),
        ({"spec": SPEC.replace(num_frames=0)}, LayoutError, "clips of 0 frames"),
        ({"spec": SPEC.replace(frame_step=0)}, LayoutError, "step 0"),
        ({"spec": SPEC.replace(size_px=(0, 16))}, LayoutError, r"size \(0, 16\)"),
        ({"spec": SPEC.replace(size_px=(16, 0))}, LayoutError, r"size \(16, 0\)"),
    ],
)
def test_wrong_options(video: Path, change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        of(video, **change)


def test_labels_out_of_range_and_no_records(video: Path) -> None:
    with pytest.raises(InputError, match=r"label of 'x' is 2, outside 0 to 1 \(1 of 2 records\)"):
        ClipDataset([ClipRecord("y", 1), ClipRecord("x", 2)], ["a", "b"])
    with pytest.raises(InputError, match="no clip for the part 'train'"):
        ClipDataset([], ["a"])


@pytest.mark.parametrize("name", ["synthetic", "synthetic_shapes", "synthetic_both"])
def test_the_synthetic_set_shows_what_its_labels_say(name: str) -> None:
    """From the exact truth of its videos: the shape's class, and where its box goes."""
    spec = InputSpec(size_px=(40, 56), layout="BTCHW", num_frames=6)
    data = synthetic_dataset(name, part="test", spec=spec, num_clips=32)
    for index, record in enumerate(data.records):
        video = data._open.video(record)
        truths = [frame.truth for frame in video]
        words = data.class_names[record.label].split()
        first, last = (truth.keypoints_NP2_px[0, 0] for truth in (truths[0], truths[-1]))
        moved = dict(zip(("right", "down"), (last - first).tolist(), strict=True))
        if name != "synthetic":
            from sidestream.video import SHAPE_NAMES

            assert SHAPE_NAMES[int(truths[0].labels_N)] in words
        if name != "synthetic_shapes":
            ways = {"right": moved["right"], "left": -moved["right"], "down": moved["down"], "up": -moved["down"]}
            assert max(ways, key=ways.__getitem__) in words
            assert max(ways.values()) > 5
            centres = [truth.keypoints_NP2_px[0, 0] for truth in truths]
            steps = [float((b - a).abs().sum()) for a, b in pairwise(centres)]
            assert max(steps) == pytest.approx(statistics.median(steps), rel=1e-3)  # it never bounces
        assert data[index].clip_TCHW.shape == (6, 3, 40, 56)


def test_synthetic_videos_leave_a_clip_nine_places_to_start() -> None:
    """A clip of 5 frames, each third one, spans 13; the video has 8 more."""
    data = synthetic_dataset(spec=SPEC.replace(num_frames=5, frame_step=3), num_clips=4)
    assert [len(list(data.frames(record))) for record in data.records] == [21] * 4
    starts = {data.item(0, epoch).pts_seconds[0] for epoch in range(120)}
    assert sorted(starts) == pytest.approx([n / 25 for n in range(9)])


def test_synthetic_parts_differ_and_seeds_count() -> None:
    first, again = open_dataset("synthetic", part="train"), open_dataset("synthetic", part="train")
    assert first[3].clip_TCHW.equal(again[3].clip_TCHW)
    others = open_dataset("synthetic", part="test"), open_dataset("synthetic", options=ClipOptions(seed=1))
    assert not any(first[3].clip_TCHW.equal(other[3].clip_TCHW) for other in others)
